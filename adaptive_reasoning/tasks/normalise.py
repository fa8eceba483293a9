r"""One spelling of an answer: take off what only dresses the value, and read what stands in plain sight.

`presentation_free` is one pass of replacements. math-verify's NormalizationConfig is not enough: it knows no characters
("\u2212", "\u221a", "\u00bd"), colours, fonts around mathematics, currencies, compound units, plain-text functions
("2pi" is p times i) or periods of decimals, and it takes the "c" of "a + b + c" and the "t" of "2t" for units. Pint
knows every unit, so m, s, t and c too, which in an answer are variables: the list here is short, and any longer word
behind a number is a unit.
"""

import re
import unicodedata
from fractions import Fraction
from itertools import accumulate
from math import gcd
from typing import NamedTuple

BRACED = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"  # to depth four: what is deeper is no dressing
PAREN = r"\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)"
CHARACTERS = {int(code, 16): new for new, codes in {
    "-": "2212 2013 2014 2010 2011", "^\\circ ": "b0 2da ba", "\\cdot ": "b7 22c5 2022", "\\times ": "d7",
    "\\le ": "2264 2a7d", "\\ge ": "2265 2a7e", "\\ne ": "2260", "\\approx ": "2248", "\\pm ": "b1", "\\mp ": "2213",
    "\\cup ": "222a", "\\cap ": "2229", "\\in ": "2208", "\\emptyset ": "2205 d8", "\\infty ": "221e", " sqrt": "221a",
    " cbrt": "221b", "\\mathbb{R}": "211d", "\\mathbb{Z}": "2124", "\\angle ": "2220", "(": "27e8", ")": "27e9",
    ".": "3002 ff61", ",": "3001", "|": "2223", "'": "2032", "/": "f7 2044",
}.items() for code in codes.split()}  # fmt: skip
NUMERALS = {
    "[\u00bc-\u00be\u2150-\u215e]": "\\frac{{{}}}{{{}}}", "[\u2070-\u207f\u00b2\u00b3\u00b9]+": "^{{{}}}",
    "[\u2080-\u208e]+": "_{{{}}}",
}  # fmt: skip
COMMANDS = {name: new for new, names in {
    "...": "ldots dots cdots dotsc", "\\emptyset ": "varnothing O", "\\{": "lbrace", "\\}": "rbrace", "(": "langle",
    ")": "rangle", "|": "lvert rvert vert", "\\ge ": "geq geqslant geqq", "\\le ": "leq leqslant leqq", "<": "lt",
    ">": "gt", "\\ne ": "neq", "\\or ": "lor vee", "\\and ": "land wedge", "\\frac": "dfrac tfrac cfrac sfrac nicefrac",
    "\\binom": "dbinom tbinom", "i": "imath", "\\log_{10}": "lg", "/": "div", "*": "ast", "^\\circ ": "degree",
    ":": "colon", "\\setminus ": "backslash", "\\to ": "rightarrow", "\\epsilon ": "varepsilon", "\\phi ": "varphi",
    "\\tan ": "tg", "\\mathbb": "Bbb", "\\\\ ": "cr", " ": "quad qquad",
    "": "pounds euro cents textdollar displaystyle textstyle checkmark blacksquare square qed",
}.items() for name in names.split()}  # fmt: skip
SIZES = "[bB]igg?[lrm]?|middle|tiny|small|normalsize|large|Large|LARGE|huge|Huge|limits|left|right|bf|it|rm"
FUNCTIONS = r"(?:arc)?(?:sin|cos|tan)|cot|sec(?!\.? ?$)|csc|log|ln|lg|exp|[Pp]i|PI|theta|alpha|beta|infty"


def _unwrapped(font: re.Match) -> str:
    r"""Unwrap \textbf{42} and \bm{\frac{1}{2}}; keep letters, which may be a unit, as \text{cm}."""
    roman = re.match("text|[mh]box|math(?:rm|sf|tt)", font[1]) and re.search(r"(?<![\\A-Za-z])[A-Za-z]", font[2])
    return f"\\text{{{font[2]}}}" if roman else font[2]


def _repeating(m: re.Match) -> str:
    whole, start, period = m[1], m[2], m[3] or m[7] or "".join(part or "" for part in m.groups()[3:6])
    parts = Fraction(int(whole + start + period) - int(whole + start or 0), (10 ** len(period) - 1) * 10 ** len(start))
    return str(parts) if parts.denominator == 1 else f"\\frac{{{parts.numerator}}}{{{parts.denominator}}}"


FONTS = (
    "text(?:normal|rm|sf|tt|up|bf|it|sc)?|[mh]box|math(?:rm|sf|tt|bf|it|normal|op|cal)|boldsymbol|bm|pmb|under(?:line|brace)"
    "|f(?:rame)?box|boxed|emph|ensuremath"
)
DRESS = [(re.compile(pattern), new) for pattern, new in [
    (r"(?<=\d)(?:\{,\}|,\s*\\!\s*|,\s*\\[,;:]\s*(?=\d{3}(?!\d)))(?=\d)", ""),
    (r"(?<![\d.,])(\d{1,3})((?:(?:\\[,;: ]|~| |')\d{3})+)(?![\d/])", lambda m: m[1] + re.sub(r"\D", "", m[2])),
    (r"\\!|\\?\$", ""), (r"(?:\\[,;:>]|(?<!\\)\\ |~|\s)+", " "),
    (r"^ ?\\[(\[](.*)\\[)\]] ?$|^ ?(\*\*|\*|__|[\"'`])(.*)\2 ?$", lambda m: m[1] or m[3] or ""),
    (rf"\\(?:{SIZES})(?![A-Za-z]) ?\.?"
     r"|\\(?:(?:text)?color(?:box)?|[hv]space|[hv]?phantom)\*? ?(?:\[[^\]]*\])? ?\{[^{}]*\}"
     r"|\\(?:begin|end) ?\{(?:align(?:ed)?|equation|gather(?:ed)?)\*?\}", ""),
    (r"\\(math[a-z]+|Bbb) ([A-Za-z0-9])", r"\\\1{\2}"),
    *[(rf"\\({FONTS}) ?{BRACED}", _unwrapped)] * 3,
    (r"\\operatorname\*? ?\{([a-z]+)\}", r"\\\1 "),
    (r"^ ?(?:R|(?:\\text\{)? ?[Aa]ll real numbers ?\}?) ?\.? ?$", r"\\mathbb{R}"),
    (r"\\begin ?\{cases\}(.*?)(?:\\\\ ?)?\\end ?\{cases\}", lambda m: m[1].replace("\\\\", ",").replace("&", "")),
    (r"(\\\\ ?)+(?=$|\\end)|\\ ?$|^ ?(?:\\\\ ?|\\therefore|\\approx|=)", ""),
    (r"\\([A-Za-z]+) ?", lambda m: COMMANDS.get(m[1], m[0])), (r"(\\[A-Za-z]+) +(?![A-Za-z])", r"\1"),
    (r"^ ?(?:\\text\{ ?)?(?:US|USD|EUR|GBP|Rs\.?) ?\}? ?(?=\d)", ""), (r"(?<=\d) ?x ?(?=10 ?\^)", r"\\times "),
    (r"(?<=\d) ?\\text ?\{ ?to ?\} ?(?=\d)", ":"), (r"\\log_(?:e(?![a-z])|\{e\}) ?", r"\\ln "),
    (r"_ ?\{? ?\((\d+)\) ?\}?|(?<=\d),? ?(?:\\text\{ ?)?(?:in )?base ?\}? ?(\d+) ?\}?$",
     lambda m: f"_{{{m[1] or m[2]}}}"), (r"^\((\w+)\)(?=_)", r"\1"),
    (r"\{([^{}]*?) ?\\choose(?![a-z]) ?([^{}]*)\}", r"\\binom{\1}{\2}"), (r"^\](?=[^()[\]]*[,;])", "("),
    (r"(?<=[,;])([^()[\]]*)\[$", r"\1)"),
    (r"(\\mathbb\{[A-Z]\}) ?- ?(?=\\\{)", r"\1\\setminus "), (r"^[A-Z](?=\([^()]*,[^()]*\)$)", ""),
    (r"\*\*", "^"), (">=", r"\\ge "), ("<=|=<", r"\\le "), ("!=", r"\\ne "),
    (r"(?<![A-Za-z\\])a(?=(?:sin|cos|tan)(?![a-z]))", "arc"), (rf"(?<![A-Za-z\\])abs ?{PAREN}", r"|\1|"),
    (rf"(?<![A-Za-z\\])({FUNCTIONS})(?![A-Za-z])", lambda m: f"\\{m[1].lower()} "),
    (r"(?:\\|(?<![A-Za-z\\]))(?:[Ii]nf|[Ii]nfinity|infin|oo)(?![A-Za-z])", r"\\infty "),
    (rf"(?:\\|(?<![A-Za-z\\]))(sq|cb)rt ?{PAREN}|(?<![A-Za-z\\])(sq|cb)rt ?(\d+)", r"\1\3rt{\2\4}"),
    (r"(?<![A-Za-z\\])(sq|cb)rt", lambda m: "\\sqrt" if m[1] == "sq" else "\\sqrt[3]"),
    (rf"\^ ?{PAREN}", r"^{\1}"),
    (r"(?:^|(?<=[=+\-*/(]))\{([^{},]*)\}", r"\1"),
    (r"(\d\.\d*?)(\d+?)\2{2,}\.\.\.$", r"\1(\2)"),
    (r"(\d*)\.(\d*)(?:\\(?:overline|bar) ?\{?(\d+)\}?|\\dot ?\{?(\d)\}?(?:(\d*)\\dot ?\{?(\d)\}?)?|\((\d+)\))",
     _repeating),
    (r"\\text ?\{,? ?(and|or) ?\}|,? (and|or) ", lambda m: f"\\{m[1] or m[2]} "),
    (r"^\\\{ ?\(?[a-z, ]+\)?(?: ?\\in ?\\mathbb\{R\})? ?(?:\||:|\\mid(?![a-z])) ?(.*)\\\}$", r"\1"),
    (r"\\\{ ?\\\}", r"\\emptyset "), (r" ?(?:\\%|%)", ""),
    (r"(?<=[=+*/-])(\d{1,3}(?:,\d{3})+)(?![\d,])|(?<=[=+*/-] )(\d{1,3}(?:,\d{3})+)(?![\d,])|"
     r"^(\d{1,3}(?:,\d{3})+)(?= ?\\(?:pi|sqrt|times|cdot))", lambda m: m[0].replace(",", "")),
    (r"(?<=[)\]]) ?(?:U|union) ?(?=[(\[])", r"\\cup "), (r"^[(\[] ?(\\begin ?\{.*\\end ?\{\w+\}) ?[)\]]$", r"\1"),
    (r"^(?:\(?[A-Za-z](?:, ?[A-Za-z])*\)?|[a-z]\([a-z]\)) ?\\in(?![a-z])", ""),
]]  # fmt: skip
DEGREES = re.compile(r" ?\^ ?(?:\\circ|\{ ?\\circ ?\}) ?((?<!\w)[CF](?![A-Za-z]))?")
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
POWER = r"(?: ?\^ ?(?:\{ ?-?\d ?\}|-?\d))?"
UNITS = (
    r"[mcdk]m|k?g|[mk]g|m[lL]|lbs?|oz|ft|in|yd|mi|hrs?|sec|sq|cu|rad|nm|k?Pa|[kM]?Hz|k?W|k?J|eV|mol|[LJNVK]|m ?/ ?s|m s"
    r"|US|m(?= ?\^ ?\{?[23])|\\Omega|\\mu ?m|[\u4e00-\u9fff]+"
)
WORD = r"\\text\{(?:[^{}]|\{[^{}]*\})*\}"
TIMES = r" ?(?:/|\\cdot|\\times|\*) ?"
UNIT = re.compile(
    rf"(?<![\s_^\\(,])(?: ?{WORD}| ?\\frac\{{{WORD}\}}\{{{WORD}{POWER}\}}| (?:{UNITS}|[A-Za-z]{{3,}})"
    r"|(?<=[\d}])(?:[mcdk]m|kg|\\Omega|\\mu ?m|[\u4e00-\u9fff]+|[A-Za-z]{4,}))"
    rf"(?![A-Za-z])\.?{POWER}(?:(?:(?:{TIMES}| )[A-Za-z]+(?![A-Za-z])|(?:{TIMES}| ?){WORD}){POWER})*[ .]*\Z"
)
NO_UNIT = re.compile(  # with the hanzi for 10^4, 10^8, 100 and 1000
    r"[\d=\u4e07\u4ebf\u767e]|\u5343(?![\u7c73\u514b\u74e6])|(?<![^\W\d])(?:hundred|thousand|[mb]illion|trillion|dozen|and|or"
    r"|[ap]m|not|[ei]|is|if|base|mod|half|more|less|squared|cubed)(?![^\W\d])", re.IGNORECASE
)  # fmt: skip


def presentation_free(text: str) -> tuple[str, str]:
    """Return `text` in one spelling, without fonts, spacing, units, currencies and percent signs, and its unit."""
    if not text.isascii():
        text = "".join(c for c in text if unicodedata.category(c) not in ("Sc", "Cf") or c == "$").translate(CHARACTERS)
        for digits, form in NUMERALS.items():
            text = re.sub(digits, lambda m, form=form: form.format(*_ascii(m[0]).split("/")), text)
        text = re.sub("[\u0391-\u03c9]", lambda m: _greek(m[0]), _ascii(text))
    for pattern, new in DRESS:
        text = pattern.sub(new, text)
    inside = TRIGONOMETRY.search(text)
    text = DEGREES.sub(lambda m: r"^{\circ}" if inside and not m[1] else "", text)
    text = text.rstrip(" .,").strip()
    value = without_unit(text)
    unit = text.removeprefix(value)
    value = re.sub(WORD, lambda m: m[0][6:-1], value)
    return with_braces(re.sub(" +", " ", value)).rstrip(" .,;").strip(), unit


QUANTITIES = [  # units of one line are different amounts of one quantity
    "mm|millimet(?:er|re) cm|centimet(?:er|re) dm|decimet(?:er|re) m|met(?:er|re) km|kilomet(?:er|re)"
    " in|inch|inches ft|foot|feet yd|yard mi|mile", "mg|milligram g|gram kg|kilogram oz|ounce lb|pound ton",
    "s|sec|second min|minute h|hr|hour day week month year", "2 3", "cent dollar",
    "ml|millilit(?:er|re) l|lit(?:er|re)",
]  # fmt: skip


def contradict(unit: str, other: str) -> bool:
    """True for "cm" and "m", "km/h" and "m/s", "cm^2" and "cm^3": the same number in them is another amount."""

    def amounts(text: str) -> list[tuple]:
        units = [(i, unit) for i, row in enumerate(QUANTITIES) for unit in row.split()]
        words = re.findall(r"[a-z]+|\d", text.lower())
        return [unit for word in words for unit in units if re.fullmatch(f"({unit[1]})s?", word)]

    left, right = amounts(unit), amounts(other)
    return left != right and [i for i, _ in left] == [i for i, _ in right]


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(CHARACTERS)


def _greek(character: str) -> str:
    name = unicodedata.name(character).split()[-1].replace("LAMDA", "LAMBDA")
    return "\\" + (name.lower() if character.islower() else name.capitalize()) + " "


def without_unit(text: str) -> str:
    """Drop the unit behind a number. Words that change the value ("3 million", "8:34 p.m.") are none."""
    unit = UNIT.search(text)
    if unit is None:
        return text
    before = re.sub(r"\\[A-Za-z]+", "", text[: unit.start()])
    words = re.sub(r"\^ ?\{? ?-?\d|\\(?!and|or)\w+", " ", unit[0]).replace(".", "")
    plain = "\\text" not in unit[0] and re.search("[A-Za-z]", before[before.rfind("=") + 1 :])
    return text if plain or NO_UNIT.search(words) or not re.search(r"\d", before) else text[: unit.start()]


ROOT = r"\\sqrt(?:\[[^\]]*\])?"
COMMAND = re.compile(rf"(?:\\(frac|binom)|{ROOT}|\\pmod)(?![A-Za-z])|\^ ?(?=\\(?:frac|sqrt|pi|theta))")
ARGUMENT = re.compile(rf" ?(?:{BRACED}|\\(?:frac|binom){BRACED}{BRACED}|{ROOT}{BRACED}|\\[A-Za-z]+|[^\s{{}}\\])")


def with_braces(text: str) -> str:
    r"""Give every argument its braces: \frac\pi4, \frac{a}b, \sqrt3, from the right so that arguments come first."""
    for command in reversed(list(COMMAND.finditer(text))):
        end, arguments = command.end(), ""
        for _ in range(2 if command[1] else 1):
            if (argument := ARGUMENT.match(text, end)) is None:
                return text
            end = argument.end()
            arguments += "{" + (argument[0].strip() if argument[1] is None else argument[1]) + "}"
        if text[end : end + 1].isdigit() and command[0][0] != "^":
            return ""  # \sqrt21 and \frac{1}{2}5 may be meant either way, so they are no answers
        text = text[: command.start()] + command[0].strip() + arguments + text[end:]
    return text


# --- what an answer is at first sight: words, options, a time, a list

LETTER = r"(?:[(\[][A-J][)\]]|[A-J])"
CHOICE = re.compile(
    r"(?i:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:? )?"
    rf"(?:({LETTER})[.:]?|(\([A-J]\)|[A-J](?:\)| ?:|\.)) ?(?![,;(]|\\and|\\or).*"
    rf"|({LETTER}(?:(?:[,; ]|\\and)*{LETTER})+))"
)
TIME = re.compile(r"0?(\d{1,2})(?::(\d\d)|(?= ?[ap]))(?: ?([ap])\.? ?m\.?)?", re.IGNORECASE)
SEPARATOR = re.compile(r"[,;]|\\and|\\or")
OPEN, CLOSE = ("(", "[", "{", "\\{", "\\begin"), (")", "]", "}", "\\}", "\\end")
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)


def key(text: str) -> str:
    """Return what is identical where two texts are the same answer at first sight."""
    if is_text(text) or len(text) == 1:
        return re.sub(r"[ ,.'-]+", " ", text).casefold()
    return re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"_\{(\w+)\}", r"_\1", text))


def is_text(text: str) -> bool:
    """True for words and point names ("ABC"). Single letters and two small letters ("xy") are variables."""
    words = re.sub(r"(?<=[A-Za-z]{2})-(?=[A-Za-z]{2})", " ", text)
    return bool(re.fullmatch(r"[A-Za-z][A-Za-z ,.']+", words)) and not re.fullmatch(r"[a-z] ?[a-z]", words)


def choice(text: str) -> str:
    """Return the letters of options: "B" of "(B) 12" or "Option B", "BCD" of "B, C, D"."""
    if (found := CHOICE.fullmatch(text)) is None:
        return ""
    letters = re.findall("[A-J]", found[found.lastindex])
    return "".join(letters if text.isalpha() else sorted(letters))


def time_of_day(text: str) -> tuple | None:
    """Return minutes of the day where "am" or "pm" or the hour says which half; (hour, minutes) where nothing does."""
    if (found := TIME.fullmatch(text)) is None:
        return None
    hour, minutes, half = int(found[1]), int(found[2] or 0), (found[3] or "").lower()
    return hour % 12 + 12 * (half == "p") if half else hour if hour > 12 else -hour, minutes


def split(text: str, separator: str | re.Pattern) -> list[str]:
    """Split at separators that stand in no bracket."""
    parts, start, depth = [], 0, 0
    for token in TOKEN.finditer(text):
        depth += (token[0] in OPEN) - (token[0] in CLOSE)
        if depth == 0 and re.fullmatch(separator, token[0]):
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def listed(text: str) -> tuple[str, list[str]]:
    """Return the brackets around the whole text ("" if none, or parentheses around one element) and the elements."""
    if len(ratio := split(text, ":")) > 2 or written_number(text):
        return ("", [text]) if len(ratio) == 1 else (":", ratio)
    tokens = TOKEN.findall(text)
    depths = list(accumulate((token in OPEN) - (token in CLOSE) for token in tokens))
    kind, inner = "", text
    if tokens and tokens[0] in OPEN[:4] and tokens[-1] in CLOSE[:4] and 0 not in depths[:-1]:
        kind, inner = (tokens[0] + tokens[-1]).replace("\\", ""), text[len(tokens[0]) : -len(tokens[-1])]
    parts = [part for part in split(inner, SEPARATOR) if part]
    if kind in ("", "{}"):
        parts = [each for part in parts for each in _signs(part)]
    elif "\\pm" in text:
        return "", _signs(text)
    if parts == ["\\emptyset"] != [text]:
        return "{{}}", parts
    return listed(inner) if kind in ("()", "{}") and len(parts) == 1 else (kind, parts)


def _signs(text: str) -> list[str]:
    if not 0 < text.count("\\pm") <= 6:  # 64 elements
        return [text]
    return [each for s, t in ("+-", "-+") for each in _signs(text.replace("\\pm", s, 1).replace("\\mp", t))]


# --- numbers

FRACTION = re.compile(r"\\frac\{ ?([+-]?\d+) ?\}\{ ?([+-]?\d+) ?\}")


class Number(NamedTuple):
    value: Fraction
    form: str  # "digits" (12, -0.5), "exponent" (1e3), "product" (6 \times 10^3), "fraction" (-1/2, 3 1/2), "unreduced"

    @property
    def is_integer(self) -> bool:
        return self.form == "digits" and self.value.denominator == 1

    def is_finished(self, gold: "Number") -> bool:
        """False for a product where an integer is asked for, and for a fraction that is not in lowest terms."""
        return self.form in ("digits", "exponent") or not gold.is_integer and self.form != "unreduced"


def written_number(text: str) -> Number | None:
    """Return the number `text` spells out, or None if it is anything else (an expression, a root, a list, a word)."""
    text = re.sub(r"([+-]) ", r"\1", re.sub(" +", " ", FRACTION.sub(r" \1/\2 ", text).strip()))
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):  # not "12,50", not "(1,250)"
        text = text.replace(",", "")
    if m := re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d{1,3}))?", text):
        return Number(Fraction(m[1]) * Fraction(10) ** int(m[2] or 0), "exponent" if m[2] else "digits")
    if m := re.fullmatch(r"(?:([+-]?\d+\.?\d*) ?(?:\\times|\\cdot|\*) ?)?10 ?\^ ?\{? ?([+-]?\d{1,3}) ?\}?", text):
        return Number(Fraction(m[1] or 1) * Fraction(10) ** int(m[2]), "product")
    m = re.fullmatch(r"([+-]?)(?:(\d+) )?([+-]?\d+) ?/ ?([+-]?\d+)", text)
    if m is None or int(m[4]) == 0:
        return None
    value = int(m[2] or 0) + Fraction(int(m[3]), int(m[4]))
    return Number(-value if m[1] == "-" else value, "fraction" if gcd(int(m[3]), int(m[4])) == 1 else "unreduced")
