r"""Grading a free-form reply against a number: what counts as its answer, and whether it is right.

What counts as the answer, when a reply gives several: the first rule that applies, and within it
the last place.

1. "boxed": the last `\boxed{…}`
2. "####": what follows the last `####`, to the end of that line
3. "answer is": what follows the last "answer is", "answer:" or "answer =", to the sentence's end
4. "last number": the last number of the text

The place decides alone: one that cannot be read makes the reply wrong, and no other is looked at.
Rules 1 and 2 want one number or one expression, so a list of candidates is wrong; under rule 3 the
first number counts. Of an equation the right-hand side counts. Units, currency, per cent signs,
thousands separators, Markdown and LaTeX dressing are ignored; "thousand" to "trillion" and an
attached "k" multiply.

Numbers written as numbers are compared exactly, in microseconds. Expressions such as `\frac{36}{2}`
or 9 * 2 go to math-verify. Its timeouts are SIGALRM, which the main thread alone may use, so they
are off, and the work is bounded before it starts: only the end of a reply is read, and only short
expressions of rational arithmetic are parsed. Any text may be graded, from any thread; none raises.
"""

import re
import threading
from dataclasses import dataclass
from fractions import Fraction

from sim.errors import MissingDependency

MAX_TEXT = 8192  # characters at the end of a reply that are read
MAX_PLACE = 200  # characters of the place where the answer stands
MAX_NUMBER = 40  # characters of one number, and its largest power of ten
MAX_EXPRESSION = 60  # characters of an expression
MAX_DEPTH = 2  # nested brackets; math-verify's LaTeX grammar takes exponential time in them

SCALES = {"": 0, "k": 3, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

NUMBER = (
    r"(?<!\w)(?<![0-9]\.)"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})++(?!,?[0-9])|[0-9]++)(?:\.[0-9]++)?|(?<!\.)\.[0-9]++)"
    r"(?:[eE](?P<exponent>[-+]?[0-9]++))?"
    r"(?:(?P<attached>k\b)|[ -]?(?P<scale>(?i:thousand|million|billion|trillion)\b))?"
)
WORDS_BEFORE = r"(?P<before>(?:[^-+*/=^<>\\0-9]|(?<=[A-Za-z])-(?=[A-Za-z]))*?)"
WORDS_AFTER = r"(?:(?<=[A-Za-z])(?: ?\^\{?[23]\}?|[23])(?![0-9])|[^+*=^<>\\0-9])*+"  # m^2, cm3

# In running text a minus belongs to the number it touches, unless it subtracts from what precedes.
NUMBER_IN_TEXT = re.compile(rf"(?P<sign>(?<![\w)\]}}%])-)?{NUMBER}")
ONE_NUMBER = re.compile(rf"{WORDS_BEFORE}(?P<sign>-\s*+)?{NUMBER}{WORDS_AFTER}", re.DOTALL)
ONE_EXPRESSION = re.compile(
    WORDS_BEFORE
    + r"(?P<expression>(?:[-+*/^\u00d7÷(){}0-9. ]|\\frac|\\times|\\cdot|\\div)++)"
    + WORDS_AFTER,
    re.DOTALL,
)
REFUSED = re.compile(
    r"[0-9]{16}"  # sympy's work grows with the digits
    r"|\^(?!\{?-?[0-9]{1,2}(?![0-9]))|\^.*\^"  # large powers, towers
    r"|[0-9.)}] *\(|[)}] *[0-9]|[0-9.] +[0-9.]"  # math-verify reads 9(2) as 11, 18 1/2 as 19/2
)

ANSWER_IS = re.compile(
    r"\banswer(?:(?: (?:to|for|of|in)\b[^.\n0-9:=]{0,50}?)?[ *_]{1,4}(?:is|would be|equals)\b"
    r"|[ *_]{0,4}[:=])",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?;](?=\s|$)")
RIGHT_HAND_SIDE = re.compile(r".*[=≈]", re.DOTALL)
SPACED_THOUSANDS = re.compile(r"(?<![0-9.,])(?<![0-9] )[0-9]{1,3}(?: [0-9]{3})++(?! ?[0-9])")
NEGATED = re.compile(r"\b(?:minus|negative)\s*$", re.IGNORECASE)
DENIED = re.compile(r"\bnot\b|n['\u2019]t\b", re.IGNORECASE)

DRESSING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[\u2212\u2013]|\\minus\b", "-"),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\{([^{}]*)\}", r" \1 "),
        (r"\\[,!]|(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3})", ""),
        (r"\\[;: ]|\\q?quad\b|~", " "),
        (r"\{,\}", ","),
        (r"(?:\b(?:US|CA|AU|NZ|HK|[AC]))?\\?[$€£¥₹]|\\[()\[\]]", ""),
        (r"\\(?:left|right|displaystyle)\b|`", ""),
        (r"(?<!\w)_+|_+(?!\w)", ""),
        (r"\\%", "%"),
        (r"\\approx\b", "≈"),
        (r"\^\{?\\circ\b\}?", "°"),
        (r"\\[dt]frac\b", r"\\frac"),
        # Emphasis opens before a word or closes after one; anything else is a product or a power.
        (r"(?<![\w)\]}\s*])\*+(?=[^\s*])|(?:^|(?<=\s))\*+(?=[^\s*])", ""),
        (r"(?<=[^\s*])\*+(?=[\s.,;:!?)]|$)", ""),
        (r"\*\*", "^"),
    )
]

_math_verify_lock = threading.Lock()  # its parser and its caches are shared by all threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What counts as the answer of a reply.

    rule: "boxed", "####", "answer is", "last number", or "none" where the text holds no number
    number: its value, where it is written as a number
    expression: LaTeX, where it is something to work out
    An answer that cannot be read has neither.
    """

    rule: str
    number: Fraction | None = None
    expression: str = ""

    def __str__(self) -> str:
        return self.expression if self.number is None else str(self.number)


def final_answer(text: str) -> Answer:
    """Find what counts as the answer; the rules are on top of this module. Raises nothing."""
    text = text[-MAX_TEXT:]
    if (start := text.rfind(r"\boxed{")) >= 0:
        return _read("boxed", _braced(text, start + len(r"\boxed{")))
    if (start := text.rfind("####")) >= 0:
        line = text[start + len("####") :].lstrip().partition("\n")[0]
        return _read("####", _sentence(line))
    if matches := list(ANSWER_IS.finditer(text)):
        line = text[matches[-1].end() :].lstrip(" \t\r\n*:").partition("\n")[0]
        place = _sentence(line)[:MAX_PLACE]
        answer = _read("answer is", place)
        return answer if str(answer) else _first_number("answer is", _undress(place))
    if numbers := list(NUMBER_IN_TEXT.finditer(_undress(text))):
        return Answer(rule="last number", number=_value(numbers[-1]))
    return Answer(rule="none")


def is_correct(answer: Answer, reference: Fraction) -> bool:
    """Whether the answer equals the reference: exactly, or to 6 decimals inside an expression.

    MissingDependency where math-verify is needed and not installed; no text raises anything.
    """
    if answer.number is not None:
        return answer.number == reference
    return bool(answer.expression) and _equals(answer.expression, reference)


def require_math_verify() -> None:
    """Import math-verify now. MissingDependency says how to install it."""
    try:
        import math_verify.grader
        import math_verify.parser
    except ImportError as error:
        raise MissingDependency(
            f"grading needs math-verify, and importing it failed ({error}): "
            "pip install 'flowd[math]', or pip install 'math-verify>=0.8'"
        ) from error
    # It would warn once that its timeouts are off; the bounds of this module stand in for them.
    math_verify.parser.TIMEOUT_WARNING_SHOWN = True
    math_verify.grader.TIMEOUT_WARNING_SHOWN = True


def _equals(expression: str, reference: Fraction) -> bool:
    require_math_verify()
    import math_verify
    import sympy  # type: ignore[import-untyped]

    with _math_verify_lock:
        parsed = math_verify.parse(
            f"${expression}$",
            extraction_config=[math_verify.LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        gold = sympy.Rational(reference.numerator, reference.denominator)
        return bool(math_verify.verify(gold, parsed, timeout_seconds=None))


def _read(rule: str, place: str) -> Answer:
    """The one number or expression of a place."""
    if len(place) > MAX_PLACE:
        return Answer(rule=rule)
    place = RIGHT_HAND_SIDE.sub("", _undress(place))
    place = SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), place)
    if match := ONE_NUMBER.fullmatch(place):
        return Answer(rule=rule, number=_value(match, match["before"]))
    if match := ONE_EXPRESSION.fullmatch(place):
        expression = match["expression"].rstrip(" (.").lstrip()
        before = match["before"]
        if _is_easy(expression) and not NEGATED.search(before) and not DENIED.search(before):
            return Answer(rule=rule, expression=expression)
    return Answer(rule=rule)


def _first_number(rule: str, place: str) -> Answer:
    match = NUMBER_IN_TEXT.search(RIGHT_HAND_SIDE.sub("", place))
    if match is None:
        return Answer(rule=rule)
    return Answer(rule=rule, number=_value(match, match.string[: match.start()]))


def _value(match: re.Match[str], before: str = "") -> Fraction | None:
    """The value of a matched number; None where the words before deny it, or it is absurd."""
    digits, exponent = match["digits"].replace(",", ""), match["exponent"] or "0"
    scale = SCALES[match["attached"] or (match["scale"] or "").lower()]
    if len(digits) > MAX_NUMBER or len(exponent) > 4 or abs(int(exponent)) > MAX_NUMBER:
        return None
    if DENIED.search(before):
        return None
    value = Fraction(digits) * Fraction(10) ** (int(exponent) + scale)
    return -value if bool(match["sign"]) != bool(NEGATED.search(before)) else value


def _is_easy(expression: str) -> bool:
    """Whether math-verify reads this right, and within milliseconds."""
    depth = deepest = 0
    for character in expression:
        depth += (character in "({") - (character in ")}")
        deepest = max(deepest, depth)
    return (
        len(expression) <= MAX_EXPRESSION
        and depth == 0
        and deepest <= MAX_DEPTH
        and re.search("[0-9]", expression) is not None
        and REFUSED.search(expression) is None
    )


def _undress(text: str) -> str:
    """Take off Markdown, currency and the LaTeX that only sets type."""
    for pattern, replacement in DRESSING:
        text = pattern.sub(replacement, text)
    return text.strip()


def _braced(text: str, start: int) -> str:
    """What stands from `start` to the brace that closes; empty where none closes it soon."""
    depth = 1
    for index, character in enumerate(text[start : start + MAX_PLACE + 1], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:index]
    return ""


def _sentence(line: str) -> str:
    """The line up to the end of the first sentence that holds a digit."""
    digit = re.search("[0-9]", line)
    end = SENTENCE_END.search(line, digit.start()) if digit else None
    return line[: end.start()] if end else line
