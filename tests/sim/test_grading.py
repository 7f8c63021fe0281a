"""What counts as the answer of a reply, and that no reply is slow or raises."""

import random
import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.errors import MissingDependency
from sim.text.grading import MAX_TEXT, Answer, final_answer, is_correct, require_math_verify


def accepts(text: str, reference: Fraction | int) -> bool:
    return is_correct(final_answer(text), Fraction(reference))


@pytest.mark.parametrize(
    "text",
    [
        *("18", "18.", "18.0", "018", "**18**", "`18`", "It is 18 eggs.", "$18", "18€", "US$18"),
        *("$18$", r"\(18\)", r"\[ 18 \]", r"18\%", "9 * 2 = 18", "Answer...18", "1.8e1", "x=18"),
        *("#### 18", "####18", "#### $18.00", "#### 18 dollars.", "#### **18**", "####\n18"),
        *(
            "#### 18 m^2",
            "#### 18 m²",
            "#### 18 cm^{2}",
            "#### 18 km/h",
            "#### 18-year",
            "#### 18!",
        ),
        *("#### 18 (dollars)", "#### Total: 18", "#### 18. As 9 is 3 times 3."),
        *("The answer is 18.", "The answer is $18$.", "The answer is **$18**.", "answer is _18_"),
        *("Answer: 18", "**Answer:** 18", "**Answer**: 18", "### Answer:\n\n18", "ANSWER = 18"),
        *("The answer to the question is 18.", "The answer would be: 18", "The answer is (18)"),
        *("The answer is 18 eggs for 3 days.", "The answer is 20 - 2 = 18 dollars."),
        *(r"\boxed{18}", r"$\boxed{18}$.", r"\boxed{\boxed{18}}", r"\boxed{ 18 }", r"\boxed{\$18}"),
        *(r"\boxed{18 \text{ dollars}}", r"\boxed{\text{18 eggs}}", r"\boxed{18\text{ m}^2}"),
        *(r"\boxed{x = 18}", r"\boxed{18^\circ}", r"\boxed{\mathbf{18}}", r"\boxed{18\,\text{m}}"),
        # worked out by math-verify
        *(r"\boxed{\frac{36}{2}}", r"\boxed{\dfrac{36}{2}}", r"\boxed{2 \cdot 9}", "#### 36/2"),
        *("#### 9*2", "#### 9 × 2", "#### 36/2 (dollars)", r"#### 1.8 \times 10^{1}"),  # noqa: RUF001
        "#### (4 + 5) * 2",
    ],
)
def test_usual_ways_of_writing_18_are_accepted(text: str) -> None:
    """Dressing does not matter; the value does."""
    assert accepts(text, 18)
    assert not accepts(text, 17)
    assert not accepts(text, -18)


@pytest.mark.parametrize(
    "text",
    [
        *("-18", "\u221218", "(-18)", "#### -18", "#### - 18", "#### -$18", "#### $-18"),
        *("The answer is -18.", "The answer is negative 18", "The answer is minus $18"),
        *(r"\boxed{-18}", r"\boxed{-\frac{36}{2}}"),
        *("#### 18 million", "#### 18k", "#### 180", "#### 1.8", "#### 18.5", "#### 18^2"),
        *("#### 18 1/2", "#### 9(2)", "#### 18.5.3", "#### 1,8", "#### 5:18"),
        "The answer is not 18.",
    ],
)
def test_other_numbers_are_rejected(text: str) -> None:
    """A sign, a scale or a fraction beside the right digits makes another number."""
    assert not accepts(text, 18)


@pytest.mark.parametrize(
    "text",
    [
        "18. No, it is 19.",
        "The answer is 18. No, the answer is 19.",
        "#### 18\n#### 19",
        r"\boxed{18} and then \boxed{19}",
        r"\boxed{19}, that is #### 18",
        "#### 19\nThe answer is 18",
        "The answer is 19, not 18",
        # a place that cannot be read does not hand over to the one before
        r"\boxed{18} or \boxed{}",
        r"\boxed{18} or \boxed{18",
        "The answer is 18.\n####",
        "18, so the answer is unknown",
        # lists of candidates
        "#### 18 or 19",
        "#### 18 18",
        r"\boxed{18, 19}",
        "#### 17 18 19",
    ],
)
def test_only_the_deciding_place_counts(text: str) -> None:
    """The right number elsewhere in the text earns nothing."""
    assert not accepts(text, 18)


@pytest.mark.parametrize(
    ("text", "rule", "number"),
    [
        (r"#### 1 The answer is 2. \boxed{3} 4", "boxed", 3),
        ("#### 1\nThe answer is 2. 4", "####", 1),
        ("1 The answer is 2. 4", "answer is", 2),
        ("The answer is 2 or 3", "answer is", 2),
        ("To answer the question, let x = 5. Then 5 * 3 = 15", "last number", 15),
        ("20 -2", "last number", -2),
        ("20-2", "last number", 2),
        ("It took 3 hours", "last number", 3),
    ],
)
def test_rule_order(text: str, rule: str, number: int) -> None:
    """Boxed before ####, #### before "answer is", that before the last number."""
    assert final_answer(text) == Answer(rule=rule, number=Fraction(number))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1,234", 1234), ("#### 1,234.00", 1234), (r"\boxed{1{,}234}", 1234), ("$1,234.", 1234)),
        *((r"\boxed{1\,234}", 1234), ("#### 1 234", 1234), ("1\u202f234", 1234)),
        *(("The answer is 1,450,000 dollars.", 1450000), ("#### 12,345,678", 12345678)),
        *(("5 million", 5000000), ("$18k", 18000), ("#### 2.5 thousand dollars", 2500)),
        *((".5", Fraction(1, 2)), ("#### 0.5", Fraction(1, 2)), ("#### 3/4", Fraction(3, 4))),
        *((r"\boxed{18\frac{1}{2}}", Fraction(37, 2)), ("#### -1,000", -1000)),
    ],
)
def test_thousands_scales_and_fractions(text: str, value: Fraction | int) -> None:
    """Separators vanish, words of scale multiply, fractions are exact."""
    assert accepts(text, value)
    assert not accepts(text, value + 1)


@given(st.fractions(max_denominator=1).filter(lambda value: abs(value) < 10**15))
@settings(max_examples=60, deadline=None)
def test_numbers_agree_with_math_verify(value: Fraction) -> None:
    """The exact comparison of plain numbers is a short cut: math-verify says the same."""
    text = str(value)
    assert final_answer(f"#### {text}").number == value
    for reference in (value, value + 1, -value):
        slow = is_correct(Answer(rule="####", expression=text), reference)
        assert is_correct(final_answer(f"#### {text}"), reference) == slow


HOSTILE = {
    "nothing": "",
    "tower": "9**9**9",
    "many towers": "9**9**9" * 3000,
    "latex tower": "9^{9^{9}}",
    "factorials": "99999!!!!",
    "huge exponent": "1e999999",
    "huge negative exponent": "1e-999999",
    "long exponent": "1e" + "9" * 9000,
    "long number": "1" * 20000,
    "braces": "{" * 9000,
    "unclosed boxes": r"\boxed{" * 3000,
    "deep box": r"\boxed{" + "{" * 90 + "1" + "}" * 91,
    "parentheses": "(" * 90 + "1" + ")" * 90,
    "marks": "#" * 20000,
    "answers": "answer is " * 2000,
    "answer and spaces": "answer" + " " * 20000 + "is",
    "unicode digits": "\u0661\u0668 and \uff11\uff18 and \u00b9\u2078",
    "surrogates and nul": "\ud800 \x00 \udfff",
    "minuses": "- " * 9000 + "x",
    "commas": "1,111" * 4000,
    "unit exponents": "m^2" * 3000,
    "dots": "1." * 9000,
    "text commands": r"\text{" * 3000,
    "fractions": r"\frac{1}{" * 30 + "2" + "}" * 30,
    "zero division": r"\frac{1}{0}",
    "zero power": "0^{-1}",
    "code": "__import__('os').system('true')",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_replies_are_wrong_at_once(text: str) -> None:
    """No reply raises or takes long, wherever its text stands; "18" is not hidden in any."""
    require_math_verify()
    for form in ("{}", "#### {}", r"\boxed{{{}}}", "The answer is {}.", "#### {} + 1"):
        start = time.thread_time()
        assert not accepts(form.format(text), 18)
        assert time.thread_time() - start < 2.0


def test_hardest_expressions_that_are_let_through_take_bounded_time() -> None:
    """Random expressions of the accepted grammar, as large as allowed: below a second each."""
    draw = random.Random(0)
    require_math_verify()

    def expression(depth: int) -> str:
        kind = draw.random()
        if depth == 0 or kind < 0.2:
            return draw.choice(["7", "12345", "999999999999999", "0.333333", "99^{99}", "7^{-99}"])
        if kind < 0.7:
            sign = draw.choice(["+", "-", "*", "/", r" \times ", r" \cdot ", "**"])
            return expression(depth - 1) + sign + expression(depth - 1)
        if kind < 0.85:
            return rf"\frac{{{expression(depth - 1)}}}{{{expression(depth - 1)}}}"
        return f"({expression(depth - 1)})"

    parsed = 0
    for _ in range(400):
        answer = final_answer(f"#### {expression(draw.randint(2, 5))}")
        parsed += bool(answer.expression)
        start = time.thread_time()
        is_correct(answer, Fraction(18))
        assert time.thread_time() - start < 3.0, answer.expression
    assert parsed > 50


@given(st.text(alphabet="0123456789.,-+*/^(){}\\$# \nabceisnrwxk", max_size=80))
@settings(max_examples=300, deadline=None)
def test_no_text_raises(text: str) -> None:
    """Whatever is written can be graded."""
    for form in (text, f"#### {text}", rf"\boxed{{{text}}}", f"answer: {text}"):
        assert is_correct(final_answer(form), Fraction(-7, 3)) in (True, False)


def test_only_the_end_of_a_long_reply_is_read() -> None:
    """The bound on the work: an answer further up than MAX_TEXT characters is not found."""
    assert accepts(r"\boxed{18} " + "x" * (MAX_TEXT - 20), 18)
    assert not accepts(r"\boxed{18} " + "x" * MAX_TEXT, 18)


def test_grading_works_in_threads() -> None:
    """SIGALRM timeouts would raise off the main thread; several threads share one parser."""
    wrong: list[str] = []

    def grade(offset: int) -> None:
        for number in range(offset, offset + 20):
            if not accepts(rf"\boxed{{\frac{{{number * 3}}}{{3}}}}", number):
                wrong.append(f"{number} rejected")
            if accepts(rf"\boxed{{\frac{{{number * 3}}}{{3}}}}", number + 1):
                wrong.append(f"{number + 1} accepted")

    threads = [threading.Thread(target=grade, args=(offset,)) for offset in (100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert wrong == []


def test_missing_math_verify_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence holds the pip command."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setitem(sys.modules, "math_verify.parser", None)
    monkeypatch.setitem(sys.modules, "math_verify.grader", None)
    with pytest.raises(MissingDependency, match=r"pip install 'flowd\[math\]'"):
        require_math_verify()
    assert accepts("#### 18", 18)  # plain numbers need no package
    with pytest.raises(MissingDependency):
        accepts("#### 36/2", 18)
