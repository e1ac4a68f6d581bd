"""Refusals: texts in which a captioning model declines to describe an image.

The first words alone do not decide: "Sorry, we are closed, says a sign" describes an image. In every language, a
refusal is an apology or the first person, soon followed by words for being unable, and then by a word for a captioner's
task. Quotation marks end the search, since quoted text is usually written in the image.
"""

import re
from typing import Literal, NamedTuple

MAX_SEARCHED = 300  # characters at the beginning that are searched

_QUOTES = r"\"“”«»„「」"
_GAP = rf"[^{_QUOTES}]"

_IMAGE = r"(?:images?|pictures?|photos?|photographs?|attachments?|files?)"
_SENT = r"(?:provided|attached|available|visible|uploaded|given|found|shared|included)"
_ENGLISH_APOLOGY = r"""
    (?:(?:i['’]?m|i[ ]am)\s+)? (?:(?:very|so|really|truly|terribly)\s+)? (?:sorry|afraid)
    | (?:my\s+)? apologies | i\s+apologi[sz]e | unfortunately | regrettably
"""
_ENGLISH_CANNOT = r"""
    can\s?not | can['’]?t | could\s+not | couldn['’]?t | (?:unable|not\s+able)\s+to | do\s+not | don['’]?t
    | (?:won['’]?t|will\s+not) (?:\s+be\s+able\s+to)?
"""
_ENGLISH_TASK = rf"""(?:
    describe(?!\s+how\b) | assist | provide(?!\s+(?:service|parking)) | generate | identify | recogni[sz]e | caption
    | comply | fulfil+ | interpret | transcribe | analy[sz]e | determine | discern
    | help\s+(?:you\b|with\b|$) | help(?=[.,!])
    | (?:see|view|access|process|create|open) \s+ (?:\w+\s+){{0,3}} {_IMAGE}\b (?!\s+without\b)
    | have\s+(?:
        the\s+ability | the\s+capability | enough\s+information | access\s+to\s+ (?:\w+\s+){{0,3}} {_IMAGE}
    )
)"""
_ENGLISH_MODEL = r"""
    (?:(?:language|vision|visual|text|image|text-based|virtual)[\s-]*)* (?:model|assistant|system|chatbot|bot)?
"""
_ENGLISH_AI = r"(?:ai|artificial\s+intelligence|(?:large\s+)?(?:vision[\s-]+)?language\s+model)"
_ENGLISH_END = r"""(?=
    \W*$ | \s*[.;!] | ,\s*(?:so|but|and|could|please)\b | \s(?:to|for\s+me|with|so)\b
    | \s+in\s+(?:your|the|this)\s+(?:message|conversation|chat|request|prompt)
)"""
# "There is no photo available, says a sign" describes an image.
_ENGLISH_SIGN = rf"(?!{_GAP}{{0,120}}? \b(?:signs?|posters?|says|reads|slogan|lettering|handwritten)\b)"
_I_AM = r"i(?:['’]?m|\s+am)"
_IT_SEEMS = r"(?:it\s+(?:seems|looks|appears)\s+ (?:like\s+|that\s+|as\s+if\s+)?)?"


def _after_apology(most: int) -> str:
    """An optional apology, and at most that many characters until the next word."""
    return rf"(?:(?:{_ENGLISH_APOLOGY})\b {_GAP}{{0,{most}}}? \b)?"


# Each pattern stands below a text that it matches.
_ENGLISH = (
    # I'm not comfortable describing this image.
    rf"{_I_AM}\s+not\s+comfortable\s+ (?:describ|identify|caption|analy[sz]|help|assist|discuss)\w*",
    # I'd rather not describe people in this image.
    rf"i(?:['’]?d|\s+would)\s+ (?:rather|prefer)\s+not\s+ (?:to\s+)? {_ENGLISH_TASK}",
    # I'm just an AI and cannot see pictures.
    rf"{_I_AM}\s+ (?:just\s+|only\s+)? an?\s+ {_ENGLISH_AI}\b {_GAP}{{0,30}}? \b(?:{_ENGLISH_CANNOT})\b",
    # Sorry, the image could not be loaded.
    rf"""{_after_apology(20)} (?:the|this|your)\s+ {_IMAGE}\s+
        (?:could\s+not|couldn['’]?t|can\s?not|can['’]?t|failed\s+to|did\s+not|didn['’]?t)\s+ (?:be\s+)?
        (?:load|display|open|process|render|retriev)\w*""",
    # Image not available.
    rf"(?:the\s+)? {_IMAGE}\s+ (?:is\s+)? not\s+available \W*$",
    # I apologize, but this content violates policy. Your request was flagged.
    rf"""{_after_apology(20)} (?:the|this|your)\s+ (?:content|request|{_IMAGE})\s+
        (?:(?:may\s+|might\s+)? violates?\s+ (?:\w+\s+){{0,3}} polic | was\s+flagged\W*$)""",
    # It looks like the image is missing.
    rf"""it\s+(?:seems|looks|appears)\s+ (?:like\s+|that\s+)? (?:the|your)\s+ {_IMAGE}\s+
        (?:is|was)\s+ (?:missing|not\s+attached|blank|empty)\b""",
    # I'm sorry, but I cannot assist with that request.
    rf"{_after_apology(60)} i(?:['’]?m|\s+am)?\s+ (?:{_ENGLISH_CANNOT})\s+ (?:\w+\s+){{0,2}} {_ENGLISH_TASK}",
    # Sorry, I cannot
    rf"""(?:{_ENGLISH_APOLOGY})\b {_GAP}{{0,60}}? \bi(?:['’]?m|\s+am)?\s+ (?:{_ENGLISH_CANNOT})
        (?:\W*\Z | \s+do\s+(?:that|this|so)\b)""",
    # I'm sorry, but no image was provided.
    rf"""(?:{_ENGLISH_APOLOGY})\b {_GAP}{{0,40}}? \bno\s+ {_IMAGE}\s+
        (?:(?:was|is|were|has\s+been)\s+)? {_SENT}\b""",
    # I must decline to describe this picture.
    rf"""{_after_apology(30)} i\s+ (?:must|have\s+to|need\s+to)\s+ (?:\w+ly\s+)?
        (?:decline|refuse)\s+ (?:to\b|this\s+request|your\s+request|$|[.,])""",
    # It seems there's no image attached.
    rf"{_IT_SEEMS} there(?:['’]s|\s+is|\s+are|\s+was)\s+ no\s+ {_IMAGE}\s+ {_SENT}\b {_ENGLISH_END}",
    # No image was uploaded.
    rf"no\s+ {_IMAGE}\s+ (?:(?:was|is|were|has\s+been)\s+)? (?:provided|attached|uploaded|shared)\b",
    # You haven't uploaded an image.
    rf"""{_IT_SEEMS} you\s+ (?:have\s?n['’]?t|have\s+not|did\s?n['’]?t|did\s+not|forgot\s+to)\s+
        (?:attach|upload|provid|shar|includ|send|sent)\w*\s+ (?:\w+\s+){{0,2}} {_IMAGE}""",
    # The image you provided appears to be empty.
    rf"""the\s+ {_IMAGE}\s+ (?:that\s+)? you\s+ (?:have\s+)? (?:\w+ed|sent)\s+ {_GAP}{{0,30}}?
        (?:empty|blank|missing|corrupt\w*|broken|unavailable|inaccessible)\b
        (?=\W*(?:[.,;]|$|\s(?:or|and|so)\s))""",
    # Please upload an image so I can describe it.
    rf"""please\s+ (?:upload|attach|share|provide|send)\s+ (?:\w+\s+){{0,3}} {_IMAGE}\b
        (?=\W*$ | \. | \s(?:so|again|and\s+i\b|for\s+me\b|to\s+describe))""",
    # As an AI language model, I do not have eyes. ("As an AI artist I painted" does not refuse anything.)
    rf"""as\s+an?\s+ {_ENGLISH_AI}\b \s* {_ENGLISH_MODEL} \W+ {_GAP}{{0,20}}? \bi(?:['’]?m|\s+am)?\s+
        (?:\w+\s+)? (?:{_ENGLISH_CANNOT}|not)\b""",
)

_CHINESE_SORRY = r"(?:很|非常|[实實]在|十分)?(?:抱歉|[对對]不起|[遗遺]憾|不好意思)"
_CHINESE_CANNOT = r"(?:[无無]法|不能|不可以|[没沒]有?[办辦]?法|不便|未能)"
_CHINESE_TASK = r"描述|[协協]助|[识識][别別]|辨[认認識]|生成|查看|回答|分析|看到|看[见見]"
_CHINESE = (
    # 抱歉，我无法描述这张图片。
    rf"(?:{_CHINESE_SORRY}{_GAP}{{0,12}}?)?"
    rf"我(?![们們]){_GAP}{{0,6}}?{_CHINESE_CANNOT}{_GAP}{{0,10}}?(?:{_CHINESE_TASK}|提供|[帮幫])",
    # 对不起，无法识别图中的人物。
    rf"{_CHINESE_SORRY}[\W但]{{0,3}}{_CHINESE_CANNOT}{_GAP}{{0,6}}?(?:{_CHINESE_TASK})",
    # 对不起，图片无法显示。
    rf"(?:{_CHINESE_SORRY}{_GAP}{{0,8}}?)?(?:[图圖][片像]|照片){_CHINESE_CANNOT}(?:正常)?"
    r"(?:[显顯]示|加[载載]|[载載]入|打[开開]|[识識][别別]|查看)",
    # 抱歉，我看不见这张图片。
    rf"(?:{_CHINESE_SORRY}{_GAP}{{0,12}}?|我)我?看不[到见見清]{_GAP}{{0,8}}?(?:[图圖]|照片)",
    # 请上传图片，我将为您描述。
    rf"[请請][您你]?先?上[传傳]{_GAP}{{0,6}}?[图圖][片像]{_GAP}{{0,6}}?(?:我|以便)",
    # 图片加载失败。
    r"[图圖][片像](?:加[载載]|[载載]入)失[败敗]\W*$|[无無]法[显顯]示[图圖][片像]\W*$",
    # 作为一个人工智能助手，我不能对此发表评论。
    rf"作[为為](?:一[个個名款])?\s*(?:ai|人工智[能慧]){_GAP}{{0,15}}?我",
)


class _Refusal(NamedTuple):
    """The three parts of a refusal, which follow each other with short gaps.

    Attributes:
      apology: words of an apology, which come first.
      cannot: words for being unable.
      task: words for a captioner's task.
      order: order of the last two parts; some languages say the verb last.
    """

    apology: str
    cannot: str
    task: str
    order: Literal["cannot, task", "task, cannot"] = "cannot, task"

    def ending(self) -> str:
        """A pattern for everything after the apology."""
        first, second = (self.cannot, self.task) if self.order == "cannot, task" else (self.task, self.cannot)
        return rf"(?:{first}){_GAP}{{0,40}}?(?:{second})"


_OTHERS = {
    "ja": _Refusal(
        apology=r"(?:大変|誠に)?(?:申し訳|すみません|ごめんなさい)",
        cannot=r"できません|出来ません|できかね|いたしかね|ありません|見えません",
        task=r"説明|描写|画像|お手伝い|お答え|回答|識別|特定|生成|リクエスト",
        order="task, cannot",
    ),
    "ko": _Refusal(
        apology=r"죄송|미안",
        cannot=r"수\s?없|못|어렵",
        task=r"이미지|설명|묘사|도와|도움을|답변|식별|생성",
        order="task, cannot",
    ),
    "es": _Refusal(
        apology=r"lo\s+siento|lo\s+lamento|lamento|disculp\w+|lamentablemente|desafortunadamente",
        cannot=r"\bno\s+(?:puedo|podr[ée]|soy\s+capaz\s+de|me\s+es\s+posible)\s",
        task=(
            r"\b(?:describir|ayudar|proporcionar|identificar|generar|analizar|asistir|responder|procesar|reconocer|"
            r"ver\s+(?:la\s+|esta\s+|ninguna\s+)?(?:imagen|foto))"
        ),
    ),
    "fr": _Refusal(
        apology=r"(?:je\s+suis\s+)?(?:vraiment\s+|sincèrement\s+)?(?:désolée?|navrée?)\b|malheureusement|je\s+regrette",
        cannot=r"\bje\s+ne\s+(?:peux|pourrais?|saurais|suis)\s",
        task=(
            r"\b(?:décrire|aider|fournir|identifier|générer|analyser|répondre|reconnaître|traiter|"
            r"voir\s+(?:l['’]|cette\s+|d['’])image)"
        ),
    ),
    "ru": _Refusal(
        apology=r"извините|простите|к\s+сожалению|прошу\s+прощения",
        cannot=r"\b(?:я\s+)?не\s+(?:могу|смогу|в\s+состоянии|способ\w+|вижу)\s",
        task=r"\b(?:изображ|опис|помо|предостав|определ|сгенер|распозна|проанализ|ответ|просм|увидеть\s+(?:это\s+)?изображ)",
    ),
    "uk": _Refusal(
        apology=r"вибачте|пробачте|на\s+жаль|перепрошую",
        cannot=r"\b(?:я\s+)?не\s+(?:можу|зможу|в\s+змозі)\s",
        task=r"\b(?:опис|допомо|визнач|розпізна|згенер|проаналіз|відпов|надати|побачити)",
    ),
    "de": _Refusal(
        apology=r"(?:es\s+)?tut\s+mir\s+(?:sehr\s+)?leid|entschuldig\w+|leider|ich\s+bedauere",
        cannot=rf"\b(?:ich\s+(?:kann|bin|darf)|(?:kann|bin|darf)\s+ich)\b{_GAP}{{0,40}}?\b(?:nicht|keine?n?)\b",
        task=(
            r"\b(?:beschreib|helfen|identifizier|erkenn|bereitstell|generier|erstellen|analysier|beantwort|unterstütz|"
            r"in\s+der\s+lage|sehen)"
        ),
    ),
    "it": _Refusal(
        apology=r"mi\s+(?:di)?spiace|spiacente|scus\w+|purtroppo",
        cannot=r"\bnon\s+(?:posso|sono\s+in\s+grado\s+di|riesco\s+a)\s",
        task=r"\b(?:descriver|aiutar|fornir|identificar|generar|analizzar|assister|risponder|riconoscer|vedere\s+\w*immag)",
    ),
    "pt": _Refusal(
        apology=r"desculp\w+|lamento|sinto\s+muito|infelizmente|peço\s+desculpas?",
        cannot=r"\bnão\s+(?:consigo|posso|sou\s+capaz\s+de|é\s+possível)\s",
        task=r"\b(?:descrever|ajudar|ajudá|fornecer|identificar|gerar|analisar|responder|reconhecer|ver\s+(?:a|esta)\s+imag)",
    ),
    "nl": _Refusal(
        apology=r"sorry|het\s+spijt\s+me|helaas|excuses",
        cannot=rf"\b(?:ik\s+kan|kan\s+ik|ik\s+ben|ben\s+ik)\b{_GAP}{{0,40}}?\bniet\b",
        task=r"\b(?:beschrijven|helpen|identificeren|herkennen|verstrekken|genereren|analyseren|beantwoorden|in\s+staat|zien)",
    ),
    "sv": _Refusal(
        apology=r"tyvärr|förlåt|jag\s+är\s+ledsen|jag\s+beklagar",
        cannot=rf"\b(?:jag\s+kan|kan\s+jag)\b{_GAP}{{0,30}}?\binte\b",
        task=r"\b(?:beskriva|hjälpa|identifiera|känna\s+igen|generera|analysera|svara|se\s+bilden)",
    ),
    "pl": _Refusal(
        apology=r"przepraszam|przykro\s+mi|niestety",
        cannot=r"\bnie\s+(?:mogę|jestem\s+w\s+stanie|potrafię)\s",
        task=r"\b(?:opisa|pomóc|zidentyfik|rozpozna|wygener|przeanaliz|odpowied|zobaczy)",
    ),
    "tr": _Refusal(
        apology=r"üzgünüm|özür\s+dilerim|maalesef|ne\s+yazık\s+ki",
        cannot=r"[ae]m[ıi]yorum\b|[ae]m[ae]m\b|mümkün\s+değil",
        task=r"resm|resim|görsel|görüntü|fotoğraf|yardım|açıkla|tanımla|betimle",
        order="task, cannot",
    ),
    "ar": _Refusal(
        apology=r"عذر|آسف|أعتذر|للأسف",
        cannot=r"لا\s*(?:أستطيع|يمكنني|أقدر)|غير\s+قادر|لست\s+قادر",
        task=r"وصف|مساعد|تحديد|التعرف|تقديم|إنشاء|تحليل|رؤية",
    ),
    "hi": _Refusal(
        apology=r"क्षमा|माफ|खेद|दुर्भाग्य",
        cannot=r"नहीं|असमर्थ",
        task=r"वर्णन|मदद|सहायता|पहचान|विश्लेषण|उत्तर",
        order="task, cannot",
    ),
    "vi": _Refusal(
        apology=r"xin\s+lỗi|rất\s+tiếc|tiếc\s+là",
        cannot=r"không\s+thể",
        task=r"mô\s+tả|giúp|hỗ\s+trợ|xác\s+định|nhận\s+dạng|cung\s+cấp|phân\s+tích|xem\s|trả\s+lời",
    ),
    "id": _Refusal(
        apology=r"(?:mohon\s+)?maaf|sayangnya",
        cannot=r"tidak\s+(?:dapat|bisa|mampu)\s",
        task=r"\b(?:mendeskripsikan|menjelaskan|membantu|mengidentifikasi|memberikan|menganalisis|melihat|menggambarkan)",
    ),
}
# In these languages, refusals without an apology name the image.
_PLAIN = {
    "de": r"bild|foto",
    "it": r"immagin|foto",
    "pt": r"image[mn]|foto",
    "es": r"imagen|foto",
    "fr": r"image|photo",
    "ru": r"изображ|фото|картин",
    "uk": r"зображ|фото|картин",
}
# Refusals without an apology that say the verb last.
_VERB_LAST = (
    # 画像を見ることができません。
    rf"(?:この|提供された|添付の)?画像(?:を|が|は|について)?(?:見|確認|表示|認識|読み込|説明|描写){_GAP}{{0,8}}?(?:できません|出来ません|されません)",
    # 이미지를 볼 수 없습니다.
    r"(?:이|해당|제공된|첨부된)?\s*(?:이미지|사진)[를을]?\s*(?:볼|확인할|인식할|설명할|열)\s*수\s*없(?:습니다|어요)",
)
_LONG_GAP, _GERMAN_GAP = 50, 30  # characters between an apology and being unable; "leider" begins many sentences


def _patterns() -> list[str]:
    patterns = [*(f"{_ENGLISH_SIGN}{pattern}" for pattern in _ENGLISH), *_CHINESE, *_VERB_LAST]
    for language, refusal in _OTHERS.items():
        gap = _GERMAN_GAP if language == "de" else _LONG_GAP
        patterns.append(rf"(?:{refusal.apology}){_GAP}{{0,{gap}}}?{refusal.ending()}")
        if language in _PLAIN:
            patterns.append(rf"(?={_GAP}{{0,120}}?(?:{_PLAIN[language]})){refusal.ending()}")
    return patterns


_REFUSALS = re.compile(
    rf"\W*(?:(?:h+m+|oops|oh|well|sure)\b\W+)?(?:{'|'.join(_patterns())})", re.IGNORECASE | re.VERBOSE
)


def is_refusal(text: str) -> bool:
    """Whether a text begins by saying that its author cannot describe an image or help with it."""
    return _REFUSALS.match(text.lstrip()[:MAX_SEARCHED]) is not None
