"""The assistant's tool: right, bounded, and never an eval."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.calculator import use_calculator


def random_expression(rng: random.Random, depth: int) -> tuple[str, Fraction | None]:
    """An expression and its value by fractions; None where it divides by zero."""
    if depth == 0 or rng.random() < 0.2:
        text = rng.choice([str(rng.randint(0, 999)), f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}", "0.5", "7"])
        return text, Fraction(text)
    (a, x), (b, y) = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    operator = rng.choice("+-*/%")
    text = f"({a}){operator}({b})" if rng.random() < 0.7 else f"( {a} ) {operator} ({b})"
    if x is None or y is None or (operator in "/%" and y == 0):
        return text, None
    value = {"+": x + y, "-": x - y, "*": x * y}[operator] if operator in "+-*" else x / y if operator == "/" else x % y
    return text, value


def test_ten_thousand_expressions_equal_fractions():
    rng = random.Random(0)
    for _ in range(10_000):
        check(*random_expression(rng, 3))


@pytest.mark.soak
@settings(max_examples=10_000, deadline=None)
@given(st.randoms(use_true_random=False))
def test_ten_thousand_expressions_that_hypothesis_thinks_of(rng):
    check(*random_expression(rng, 3))


def check(text: str, value: Fraction | None) -> None:
    """The calculator's answer is the fraction where its decimal form ends, else to 12 digits; none where none is."""
    result = use_calculator(text)
    if value is None:
        assert result is None, text
    else:
        ends = 10**300 % value.denominator == 0
        assert result is not None, text
        assert abs(Fraction(result) - value) <= (0 if ends else abs(value) * Fraction(1, 10**11)), text


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*(3+4)", "84"),
        ("7/2", "3.5"),
        ("1/3", "0.333333333333"),
        ("-3+5", "2"),
        ("1,000*3", "3000"),
        ("05+.5", "5.5"),
        ("2-5", "-3"),
        ("1000000*1000000", "1000000000000"),
        ("100*1.10", "110"),
        ("1234567890123.45+0.01", "1234567890123.46"),
        ("1/1048576", "0.00000095367431640625"),
        ("0.1234567890123456789*10", "1.234567890123456789"),
        ("1,234,567.5*2", "2469135"),
        ("'strawberry'.count('r')", "3"),
        ('"strawberry".count("xy")', "0"),
        ("'profile'.count('f')", "1"),
        ("'evaluate'.count('e')", "2"),
        ("'director of the opening import'.count('i')", "3"),
    ],
)
def test_what_people_ask(expression, value):
    """nanochat's blacklist of substrings refused honest words: profile, opening, director, evaluate."""
    assert use_calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "'a'*10**9",
        "(" * 10_000 + ")" * 10_000,
        "(" * 120 + "1" + ")" * 119,
        "1" * 10_000,
        "-" * 250,
        "__import__('os').system('true')",
        "'a'.center(10**10).count('a')",
        "'a'.count('a', 0)",
        "[1][0]",
        "1 if 1 else 2",
        "1/0",
        "1%0",
        "1 2",
        "1e9",
        "0x10",
        "",
        " ",
        "\x00",
        "'a\\'.count('a')",
        "'a'.count(\"a\"')",
        "1_000",
        "٣+٤",
        "2(3)",
        "3,14*2",
        "0,001*5",
        "1,0000",
        "1,000,00",
        "0.5,000",
        "1.2.3",
    ],
)
def test_what_is_no_expression_is_refused(expression):
    assert use_calculator(expression) is None


def test_it_works_in_a_thread():
    """nanochat's used SIGALRM, which works on the main thread alone: elsewhere every call gave nothing."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(use_calculator, "6*7").result() == "42"
