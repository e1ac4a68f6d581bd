"""Instructions for the generated edits, in several wordings, in English and Chinese.

Names in braces are placeholders; for instance, `object` becomes `the red kangaroo`, and `an_object` `a red kangaroo`.
"""

from collections.abc import Mapping

import numpy as np

from data_pipeline.records.schema import INSTRUCTION, Caption

WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "text/change": {
        "en": (
            'Change the text "{before}" to "{after}".',
            'Replace the words "{before}" with "{after}", in the same lettering.',
            'It says "{before}". Make it say "{after}" and leave everything else as it is.',
        ),
        "zh": ("把文字“{before}”改成“{after}”。", "将图中的“{before}”替换为“{after}”，字体和颜色保持不变。"),
    },
    "text/add": {
        "en": ('Write "{after}" {where}.', 'Add the text "{after}" {where}.'),
        "zh": ("在画面{where}写上“{after}”。", "在画面{where}添加文字“{after}”。"),
    },
    "text/remove": {
        "en": ('Remove the text "{before}".', 'Erase the words "{before}" and restore what is behind them.'),
        "zh": ("去掉文字“{before}”。", "擦除图中的“{before}”，还原被遮住的画面。"),
    },
    "restoration/noise": {
        "en": ("Remove the noise from this photo.", "Denoise the picture.", "Clean up the grain, keep the details."),
        "zh": ("去除照片中的噪点。", "给这张图片降噪，保留细节。"),
    },
    "restoration/blur": {
        "en": ("Make this blurred picture sharp.", "Remove the blur.", "Bring the photo back into focus."),
        "zh": ("把这张模糊的照片变清晰。", "去除图片的模糊。"),
    },
    "restoration/jpeg": {
        "en": ("Remove the compression artefacts.", "Get rid of the JPEG blocks.", "Repair the heavy compression."),
        "zh": ("去除压缩造成的失真。", "消除图片中的JPEG块状痕迹。"),
    },
    "restoration/rain": {
        "en": ("Remove the rain.", "Take the streaks of rain out of the picture.", "Show the scene without rain."),
        "zh": ("去掉画面中的雨丝。", "去除图中的雨。"),
    },
    "restoration/low_light": {
        "en": ("Brighten this dark photo to normal light.", "Restore the photo that was taken in too little light."),
        "zh": ("把这张昏暗的照片恢复到正常亮度。", "修复这张光线不足的照片。"),
    },
    "tone/saturate": {
        "en": ("Make the colours {much} more vivid.", "Increase the saturation {lot}."),
        "zh": ("让颜色{lot}鲜艳一些。", "{lot}提高图片的饱和度。"),
    },
    "tone/desaturate": {
        "en": ("Make the colours {much} paler.", "Lower the saturation {lot}."),
        "zh": ("让颜色{lot}淡一些。", "{lot}降低图片的饱和度。"),
    },
    "tone/warm": {
        "en": ("Make the colours {much} warmer.", "Shift the white balance {lot} towards warm light."),
        "zh": ("把色调{lot}调暖一些。", "让白平衡{lot}偏暖。"),
    },
    "tone/cool": {
        "en": ("Make the colours {much} cooler.", "Shift the white balance {lot} towards cold light."),
        "zh": ("把色调{lot}调冷一些。", "让白平衡{lot}偏冷。"),
    },
    "tone/brighten": {
        "en": ("Make the picture {much} brighter.", "Raise the exposure {lot}."),
        "zh": ("把图片{lot}调亮一些。", "{lot}提高曝光。"),
    },
    "tone/darken": {
        "en": ("Make the picture {much} darker.", "Lower the exposure {lot}."),
        "zh": ("把图片{lot}调暗一些。", "{lot}降低曝光。"),
    },
    "tone/black_and_white": {
        "en": ("Turn this into a black-and-white picture.", "Remove all colour from the photo."),
        "zh": ("把图片变成黑白的。", "去掉照片的全部颜色。"),
    },
    "tone/colourise": {
        "en": ("Colourise this black-and-white picture.", "Give the photo its natural colours."),
        "zh": ("给这张黑白图片上色。", "还原照片的自然色彩。"),
    },
    "hue": {
        "en": (
            "Change the colour of {object} to {colour}.",
            "Make {object} {colour}, and nothing else.",
            "Recolour {object}: it should be {colour}.",
        ),
        "zh": ("把{object}的颜色改成{colour}。", "只把{object}变成{colour}。"),
    },
    "insertion": {
        "en": ("Add {an_object} {where}.", "Put {an_object} {where} of the picture.", "Place {an_object} {where}."),
        "zh": ("在画面{where}加上{an_object}。", "把{an_object}放在画面{where}。"),
    },
    "removal": {
        "en": (
            "Remove {object}.",
            "Take {object} out of the picture and fill in what is behind it.",
            "Erase {object} {where}, with its shadow.",
        ),
        "zh": ("移除画面中的{object}。", "去掉{where}的{object}，还原背景。"),
    },
    "background/plain": {
        "en": (
            "Replace the background behind {object} with plain {colour}.",
            "Put {object} on a plain {colour} background.",
        ),
        "zh": ("把{object}的背景换成纯{colour}。", "将{object}放在纯{colour}背景上。"),
    },
    "background/described": {
        "en": (
            "Replace the background, keep {object} as it is. The new background: {caption}",
            "Keep {object} and change what is behind it to this: {caption}",
        ),
        "zh": ("保留{object}，把背景换成：{caption}", "替换背景，{object}不变。新的背景：{caption}"),
    },
    "background/source": {
        "en": (
            "Replace the background of image {first} with the scene of image {second}; {object} stays as it is.",
            "Keep {object} of image {first} and use image {second} as the background.",
        ),
        "zh": (
            "把图{first}的背景换成图{second}的场景，{object}保持不变。",
            "保留图{first}中的{object}，以图{second}作为背景。",
        ),
    },
    "compose/2": {
        "en": (
            "Put {object} of image {first} into the scene of image {scene}, {where}.",
            "Take {object} from image {first} and place it {where} of image {scene}.",
            "Image {scene} with {object} of image {first} {where}.",
        ),
        "zh": ("把图{first}中的{object}放到图{scene}的{where}。", "将图{first}的{object}加入图{scene}，位于{where}。"),
    },
    "compose/3": {
        "en": (
            "Put {object} of image {first} {where} and {other} of image {second} {other_where} of image {scene}.",
            "In the scene of image {scene}, place {object} from image {first} {where}, and {other} from image {second} "
            "{other_where}.",
        ),
        "zh": (
            "把图{first}中的{object}放在图{scene}的{where}，把图{second}中的{other}放在{other_where}。",
            "以图{scene}为背景，{where}放图{first}的{object}，{other_where}放图{second}的{other}。",
        ),
    },
}


def instructions(
    kind: str, rng: np.random.Generator, english: Mapping[str, object], chinese: Mapping[str, object] | None
) -> tuple[Caption, ...]:
    """Two English instructions and a Chinese one; only the English ones if `chinese` is None."""
    forms = WORDINGS[kind]
    first, second = rng.choice(len(forms["en"]), 2, replace=False)
    texts = [(forms["en"][place].format(**english), "en") for place in (first, second)]
    place = int(rng.integers(len(forms["zh"])))
    if chinese is not None:
        texts.append((forms["zh"][place].format(**chinese), "zh-Hans"))
    return tuple(Caption(" ".join(text.split()), INSTRUCTION, language) for text, language in texts)
