"""The assistant's tool: arithmetic, and counting letters in a word.

Promises: never `eval`; nothing but numbers, + - * / % and parentheses, or `"word".count("w")`, is ever computed;
results are exact where they have a finite decimal form; every call is over in microseconds, in any thread. Does not:
powers, functions, variables.
"""

import ast
import re
from collections import deque
from dataclasses import dataclass, field
from decimal import Decimal, Inexact, localcontext
from fractions import Fraction
from operator import add, mod, mul, sub, truediv

from nanochat.tokenizer import Tokenizer

MAX_CHARS = 256  # no honest expression is longer, and with it time, memory and nesting are bounded
PLACES = 1000  # more than any result with a finite decimal form has, whose expression is that short
DIGITS = 12  # significant digits of a quotient that does not end, such as 1/3
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
NUMBER = re.compile(r"\d+\.?\d*|\.\d+")
ARITHMETIC = re.compile(r"[-+*/%(). \d]+", re.ASCII)
COUNT = re.compile(r"""\s*(['"])([^'"\\\n]*)\1\s*\.\s*count\s*\(\s*(['"])([^'"\\\n]*)\3\s*\)\s*""")
OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.Mod: mod}


@dataclass
class ToolUse:
    """The tool of one sequence: what stands between <|python_start|> and <|python_end|> goes to the calculator, whose
    answer is forced upon the sequence between <|output_start|> and <|output_end|>. So is "error": a model left alone
    after a failed call invents a result.
    """

    tokenizer: Tokenizer
    call: list[int] | None = None  # the tokens of a call that is being written
    forced: deque[int] = field(default_factory=deque)  # what the sequence must say next

    def see(self, token: int) -> None:
        if token == self.tokenizer.encode_special("<|python_start|>"):
            self.call = []
        elif token == self.tokenizer.encode_special("<|python_end|>") and self.call is not None:
            answer = use_calculator(self.tokenizer.decode(self.call)) or "error"
            self.forced.extend(self.tokenizer.encode(answer, prepend="<|output_start|>", append="<|output_end|>"))
            self.call = None
        elif self.call is not None:
            self.call.append(token)


def use_calculator(expression: str) -> str | None:
    """The value of an expression as text, or None where it is none: "12*(3+4)" gives "84", "7/2" gives "3.5", "1/3"
    gives "0.333333333333", and "'strawberry'.count('r')" gives "3". A comma separates thousands ("1,000") or is none.
    """
    if len(expression) > MAX_CHARS:
        return None
    if match := COUNT.fullmatch(expression):
        return str(match[2].count(match[4]))
    plain = THOUSANDS.sub(lambda number: number[0].replace(",", ""), expression).strip()
    if not ARITHMETIC.fullmatch(plain):
        return None
    try:
        quoted = NUMBER.sub(r"('\g<0>')", plain)  # as text: Python's parser rounds decimals and refuses 05
        return format_fraction(evaluate(ast.parse(quoted, mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def evaluate(node: ast.expr) -> Fraction:
    """The exact value of a parsed expression; ValueError for anything but numbers and OPERATORS."""
    match node:
        case ast.Constant(value=str() as number):
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluate(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return evaluate(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(left), evaluate(right))
    raise ValueError(f"not arithmetic: {ast.dump(node)}")


def format_fraction(value: Fraction) -> str:
    """Exact where the decimal form ends, else rounded to DIGITS significant digits."""
    with localcontext(prec=PLACES) as context:
        context.clear_flags()
        quotient = Decimal(value.numerator) / Decimal(value.denominator)
        if context.flags[Inexact]:
            context.prec = DIGITS
        return format(quotient.normalize(), "f")
