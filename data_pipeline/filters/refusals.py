"""Refusals: what captioning models write instead of a caption.

The opening words alone do not tell: "Sorry, we are closed, says a sign" describes a picture. So a refusal begins with
an apology, or with the first person, and says soon after that this person cannot do what a captioner does.
"""

import re

REACH = 300  # characters of the beginning that are looked at

_IMAGE = r"(?:images?|pictures?|photos?|photographs?|attachments?|files?)"
_ENGLISH_APOLOGY = (
    r"(?:(?:i['’]?m|i am)\s+)?(?:(?:very|so|really|truly|terribly)\s+)?(?:sorry|afraid)|(?:my\s+)?apologies|"
    r"i\s+apologi[sz]e|unfortunately|regrettably"
)
_ENGLISH_CANNOT = (
    r"can\s?not|can['’]?t|could\s+not|couldn['’]?t|(?:unable|not\s+able)\s+to|do\s+not|don['’]?t|"
    r"(?:won['’]?t|will\s+not)(?:\s+be\s+able\s+to)?"
)
_ENGLISH_TASK = (
    r"(?:describe|assist|provide|generate|identify|recogni[sz]e|caption|comply|fulfil+|interpret|transcribe|analy[sz]e|"
    rf"help\s+(?:you\b|with\b|$)|help(?=[.,!])|(?:see|view|access|process|create|open)\s+(?:\w+\s+){{0,3}}{_IMAGE}|"
    r"have\s+(?:the\s+ability|the\s+capability|access|enough\s+information))"
)
_CHINESE_CANNOT = r"(?:[无無]法|不能|不可以|[没沒]有?[办辦]?法|不便)"
_CHINESE_TASK = r"描述|[协協]助|[识識][别別]|辨[认認識]|生成|查看|回答|分析|看到|看[见見]"

_REFUSALS = re.compile(
    r"\W*(?:"
    + "|".join(
        (
            rf"(?:(?:{_ENGLISH_APOLOGY})\b[^\"“”]{{0,60}}?\b)?"
            rf"i(?:['’]?m|\s+am)?\s+(?:{_ENGLISH_CANNOT})\s+(?:\w+\s+){{0,2}}{_ENGLISH_TASK}",
            rf"(?:{_ENGLISH_APOLOGY})\b[^\"“”]{{0,60}}?\bi(?:['’]?m|\s+am)?\s+(?:{_ENGLISH_CANNOT})"
            r"(?:\W*\Z|\s+do\s+(?:that|this|so)\b)",  # cut short
            rf"(?:{_ENGLISH_APOLOGY})\b[^\"“”]{{0,40}}?\bno\s+{_IMAGE}\s+(?:(?:was|is|were|has\s+been)\s+)?"
            r"(?:provided|attached|available|visible|uploaded|given|found|shared)\b",
            r"as\s+an?\s+(?:ai|artificial\s+intelligence)\b[^\"“”.]{0,60}?\b(?:i|my)\b",
            r"(?:(?:很|非常|[实實]在|十分)?(?:抱歉|[对對]不起|[遗遺]憾|不好意思)[^“”「」\"]{0,12}?)?"
            rf"我(?![们們])[^“”「」\"]{{0,6}}?{_CHINESE_CANNOT}[^“”「」\"]{{0,10}}?(?:{_CHINESE_TASK}|提供|[帮幫])",
            rf"(?:很|非常|[实實]在|十分)?(?:抱歉|[对對]不起|[遗遺]憾|不好意思)[\W但]{{0,3}}{_CHINESE_CANNOT}"
            rf"[^“”「」\"]{{0,6}}?(?:{_CHINESE_TASK})",
            r"作[为為](?:一[个個名款])?\s*(?:ai|人工智[能慧])[^“”「」\"]{0,15}?我",
            r"(?:大変|誠に)?(?:申し訳|すみません|ごめんなさい)[^「」“”]{0,40}?"
            r"(?:説明|描写|画像|お手伝い|お答え|回答|識別|特定|生成|リクエスト)[^「」“”]{0,20}?"
            r"(?:できません|出来ません|できかね|いたしかね|ありません|見えません)",
            r"(?:죄송|미안)[^“”\"]{0,30}?(?:이미지|설명|묘사|도와|도움을|답변|식별|생성)[^“”\"]{0,20}?(?:수\s?없|못|어렵)",
            r"(?:lo\s+siento|lo\s+lamento|lamento|disculp\w+)\b[^\"“”«]{0,40}?\bno\s+(?:puedo|podr[ée]|soy\s+capaz\s+de)\s+"
            r"(?:\w+\s+){0,2}?(?:describir|ayudar|proporcionar|identificar|generar|analizar|asistir|responder|procesar|"
            r"reconocer|ver\s+(?:la\s+|esta\s+|ninguna\s+)?(?:imagen|foto))",
            r"(?:je\s+suis\s+)?(?:vraiment\s+|sincèrement\s+)?(?:désolée?|navrée?)\b[^\"“”«]{0,40}?\bje\s+ne\s+"
            r"(?:peux|pourrais?|saurais|suis)\s+(?:malheureusement\s+)?(?:pas\s+)?(?:en\s+mesure\s+d(?:e\s+|['’])|"
            r"capable\s+d(?:e\s+|['’]))?(?:vous\s+)?(?:décrire|aider|fournir|identifier|générer|analyser|répondre|"
            r"reconnaître|traiter|voir\s+(?:l['’]|cette\s+|d['’])image)",
            r"(?:извините|простите|к\s+сожалению|прошу\s+прощения)\b[^\"“”«]{0,40}?\bя\s+не\s+"
            r"(?:могу|смогу|в\s+состоянии|способ\w+)\s+(?:\w+\s+){0,3}?(?:опис|помо|предостав|определ|сгенер|"
            r"распозна|проанализ|ответ|просм|увидеть\s+(?:это\s+)?изображ)\w*",
        )
    )
    + ")",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Whether a text says, at its beginning, that its author cannot describe a picture or help with it."""
    return _REFUSALS.match(text.lstrip()[:REACH]) is not None
