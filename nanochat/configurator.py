"""Settings of a script: its own module variables, overridden from the command line and from settings files.

    SHORT = {"g": "model_tag"}  # optional: -g d20 for --model-tag=d20; "" names the setting that bare words give

    # Model
    depth: Positive = 20  # number of Transformer layers; width and heads follow from it
    model_tag: str | None = None  # name of the checkpoint directory (None = d<depth>)
    settings = configure(__name__)

A setting is an assignment to a lowercase name above the configure line: name, default, type (of a number one that says
its range, such as Positive; of bool and str that of the default), help (the trailing comment). The last full-line
comment above is its section; of a section that says "at most one of these" only one can be set whose default is None.

    --depth=4   --model-tag=x   --model_tag x   -g x   --dry-run   --no-dry-run   --model-tag=None   tiny.py

A bare word, one without dashes, is a settings file, written like the block (`depth = 4  # why`). Its first line may
name another one beside it, whose settings it changes (`base = "laptop.py"`). What comes later on the command line wins;
several bare words for one text are joined as a shell quotes them. A program that runs a script takes the script's
settings before its own: `ALSO = "scripts/base_train.py"` begins its block.

Promises: scripts and settings files are parsed, never executed; every value is checked before the first is assigned; a
mistake is one line and exit code 2. Does not: abbreviate names, read the environment, follow a base's own base.
"""

import ast
import contextlib
import difflib
import io
import math
import operator
import re
import shlex
import shutil
import sys
import tempfile
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO, get_args, get_origin

from nanochat.common import UserError, print0, say_why

# What a number may be, by the name that a setting's line says: type, as --help shows it, test.
Positive = Annotated[int, "int >= 1", lambda n: n >= 1]
Several = Annotated[int, "int >= 2", lambda n: n >= 2]
Natural = Annotated[int, "int >= 0", lambda n: n >= 0]
Interval = Annotated[int, "int >= 1 or -1", lambda n: n >= 1 or n == -1]  # -1 = never, or all
Seed = Annotated[int, "0 <= int < 2^32", lambda n: 0 <= n < 2**32]
Port = Annotated[int, "0 <= int < 65536", lambda n: 0 <= n < 65536]
Share = Annotated[float, "0 <= float <= 1", lambda x: 0 <= x <= 1]
Fraction = Annotated[float, "0 < float < 1", lambda x: 0 < x < 1]
Rate = Annotated[float, "0 <= float < 1e9", lambda x: 0 <= x < 1e9]
Amount = Annotated[float, "float > 0", lambda x: 0 < x < math.inf]
Minutes = Annotated[float, "float > 0 or -1", lambda x: 0 < x < math.inf or x == -1]  # -1 = never


class Kind(NamedTuple):
    """What a setting can be beside the words of its Literal and None."""

    type: type
    name: str
    holds: Callable[[Any], bool]


KINDS = {name: Kind(*get_args(kind)) for name, kind in globals().items() if get_origin(kind) is Annotated}
KINDS |= {kind.__name__: Kind(kind, kind.__name__, lambda value: True) for kind in (bool, str)}
WORDS = Kind(str, "", lambda value: False)  # these words and nothing else
TRUTH = {"true": True, "1": True, "false": False, "0": False}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
GIVEN: set[str] = set()  # the settings that this process was given, a default too; configure() fills it
OPTION = re.compile(r"--|--?[A-Za-z_][\w-]*(=.*)?", re.DOTALL)  # never a spaced value; "-1" and "- a list" can be one

# What nanoGPT, nanuGPT and older nanochats call a setting, where the name is too far from ours for difflib.
FORMER_NAMES = dict(
    pair.split("=")
    for pair in """
    batch_size=device_batch_size block_size=max_seq_len context_length=max_seq_len device=device_type
    eval_interval=eval_every eval_iters=eval_tokens gradient_accumulation_steps=total_batch_size
    learning_rate=matrix_lr max_iters=num_iterations max_new_tokens=max_tokens n_layer=depth start=prompt
    target_examples_per_step=total_batch_size wandb_run_name=run
    """.split()
)


@dataclass(frozen=True)
class Setting:
    """One line of a settings block."""

    name: str
    kind: Kind
    words: tuple[str | None, ...]  # allowed beside it
    default: object
    help: str
    section: str

    @property
    def type_name(self) -> str:
        """As --help shows it: `int >= 1`, `int >= 1 or auto`, `str or None`, `base, mid`."""
        words = [*map(str, self.words)]
        return ", ".join(words) if self.kind is WORDS else " or ".join([self.kind.name, *words])

    def check(self, value: object, given: str) -> object:
        """The value as this setting holds it: an int as a float where one is wanted, a -1 that is not in the range as
        None, which older command lines mean by it. UserError if it does not fit.
        """
        if self.kind.type is float and type(value) is int:
            with contextlib.suppress(OverflowError):
                value = float(value)
        if type(value) is self.kind.type and self.kind.holds(value):
            return value
        if None in self.words and self.kind.type in (int, float) and value == -1:
            return None
        if value not in self.words:
            raise UserError(f"{given}: expected {'one of ' if self.kind is WORDS else ''}{self.type_name}")
        return value

    def parse(self, text: str, given: str) -> object:
        """The value of a text from the command line; UserError when it does not fit."""
        if text in map(str, self.words):
            return text if text in self.words else None
        value: object = text
        with contextlib.suppress(KeyError, ValueError):  # then it is still text, which check() refuses
            value = TRUTH[text.lower()] if self.kind.type is bool else self.kind.type(text)
        return self.check(value, given)


@dataclass(frozen=True)
class Block:
    """The settings block of a script, as its source says it."""

    doc: str
    settings: dict[str, Setting]
    short: dict[str, str]  # letter -> name

    def find(self, name: str, given: str) -> Setting:
        """The setting of that name; UserError with the likeliest one otherwise."""
        if name in self.settings:
            return self.settings[name]
        former = FORMER_NAMES.get(name, "")
        near = [former] if former in self.settings else difflib.get_close_matches(name, self.settings, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"no setting named {name} ({given}).{hint} --help lists them all.")

    def rivals(self, name: str) -> set[str]:
        """The settings of which one alone can be set, if this is one of them."""
        section = self.settings[name].section
        if self.settings[name].default is not None or "at most one of these" not in section:
            return set()
        return {other.name for other in self.settings.values() if other.section == section and other.default is None}


# -----------------------------------------------------------------------------
# Reading a script


def literal(node: ast.expr | None) -> object:
    """A literal, or sums, differences, products and quotients of number literals; ValueError for anything else."""
    if node is None:
        raise ValueError
    try:
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            left, right = literal(node.left), literal(node.right)
            if isinstance(left, (int, float)) and isinstance(right, (int, float)):
                return ARITHMETIC[type(node.op)](left, right)
        return ast.literal_eval(node)
    except (ArithmeticError, TypeError, RecursionError) as error:  # 1 / 0, {[]: 1}, 1 + 1 + ... of 900 terms
        raise ValueError(str(error)) from None


def assignment(node: ast.stmt) -> tuple[str, ast.expr | None, ast.expr | None]:
    """(name, annotation, value) of an assignment to one name; the name is empty for any other statement."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return name, None, value
        case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
            return name, annotation, value
    return "", None, None


def read_type(annotation: ast.expr | None, default: object) -> tuple[Kind, tuple[str | None, ...]]:
    """(kind, words) of a setting; ValueError when that is none of the allowed types."""
    match annotation:
        case None if isinstance(default, bool | str):
            return KINDS[type(default).__name__], ()
        case ast.Name(id=name) if name in KINDS:
            return KINDS[name], ()
        case ast.Constant(value=None):
            return WORDS, (None,)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            words = [literal(word) for word in (inner.elts if isinstance(inner, ast.Tuple) else [inner])]
            if all(isinstance(word, str) for word in words):
                return WORDS, tuple(map(str, words))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            (kind, before), (other, after) = read_type(left, default), read_type(right, default)
            if other is WORDS:
                return kind, (*before, *after)
    raise ValueError


def read_comments(source: str) -> dict[int, str]:
    """{line: text} of all comments but rules of dashes."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = {token.start[0]: token.string.lstrip("#").strip() for token in tokens if token.type == tokenize.COMMENT}
    return {line: text for line, text in texts.items() if re.search(r"\w", text)}


def read_block(path: Path) -> Block:
    """The settings block of a script, which is not imported; UserError with file and line when it is badly written."""
    source = path.read_text(encoding="utf-8").partition("\nsettings = configure(")[0] + "\n"
    tree, comments = ast.parse(source, str(path)), read_comments(source)
    settings: dict[str, Setting] = {}
    short: dict[str, str] = {}
    section, end = "Settings", 0
    for node in tree.body:
        above, start, end = range(end + 1, node.lineno), node.lineno, node.end_lineno or node.lineno
        section = [section, *(comments[line] for line in above if line in comments)][-1]
        name, annotation, value = assignment(node)
        where = f"{path}:{start}: setting {name}"
        if name == "SHORT" and value:
            short = ast.literal_eval(value)
        if name == "ALSO" and value:
            settings |= read_block(path.resolve().parents[1] / ast.literal_eval(value)).settings
        if not name or name.startswith("_") or name != name.lower():
            continue
        help = " ".join(comments[line] for line in range(start, end + 1) if line in comments)
        if name in settings:
            raise UserError(f"{where} is declared twice")
        if not help:
            raise UserError(f"{where} has no comment; it is the help text: {name} = ...  # what it does")
        try:
            default = literal(value)
            kind, words = read_type(annotation, default)
        except ValueError:
            allowed = f"{', '.join(KINDS)} or a Literal of words, perhaps | None"
            raise UserError(f"{where} needs a literal default and one of the types {allowed}") from None
        unchecked = Setting(name, kind, words, default, help, section)
        settings[name] = replace(unchecked, default=unchecked.check(default, f"{where} = {default!r}"))
    if "h" in short or not set(short.values()) <= settings.keys():
        raise UserError(f"{path}: SHORT maps letters (not h) to settings of the block")
    return Block(ast.get_docstring(tree) or "", settings, short)


# -----------------------------------------------------------------------------
# Reading what the user gave


def read_settings_file(block: Block, word: str, derived: str = "") -> Iterator[tuple[str, object, str]]:
    """(name, value, file:line) of a file of `name = value` lines, after those of its base, if it is none itself that
    another one is `derived` from. UserError with the line of the first mistake.
    """
    try:
        tree = ast.parse(text := Path(word).read_text(encoding="utf-8-sig"))
    except OSError as error:
        is_setting = "=" in word and word.partition("=")[0].replace("-", "_") in block.settings
        hint = f"it is the base of {derived}" if derived else "settings are given as --name=value"
        hint = f"did you mean --{word}?" if is_setting else hint
        raise UserError(f"cannot read settings file {word!r} ({error.strerror}); {hint}") from None
    except SyntaxError as error:
        raise UserError(f"{word}:{error.lineno or 1}: {error.msg}; expected name = value") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{word}: not a settings file ({str(error) or 'nested too deeply'})") from None
    lines = tree.body[ast.get_docstring(tree) is not None :]
    for node in lines:
        name, _, value = assignment(node)
        where, line = f"{word}:{node.lineno}", str(ast.get_source_segment(text, node)).split("\n")[0][:100]
        try:
            str(given := literal(value))  # a ValueError, too: an int too long to be printed
        except ValueError:
            raise UserError(f"{where}: `{line}`: expected name = literal value; nothing is executed") from None
        if name == "base":
            if derived or node is not lines[0] or not isinstance(given, str):
                of = f"; this one is the base of {derived}" if derived else ""
                raise UserError(f"{where}: {line}: expected a file's name, in the first line, and one level deep{of}")
            yield from read_settings_file(block, str(Path(word).parent / given), word)
            continue
        yield name, block.find(name, where).check(given, f"{where}: {line}"), where


def read_words(block: Block, argv: Sequence[str]) -> Iterator[tuple[str, object, str]]:
    """(name, value, where it was given) of a command line, in its order. UserError for the first word that is wrong."""
    words, bare_words = list(argv), []
    while words:
        word = words.pop(0)
        if word == "--":  # torchrun and older command lines put one in front
            continue
        if not word.startswith("-"):
            bare = block.settings.get(block.short.get("", ""))
            if bare and not word.endswith(".py"):
                bare_words.append(word)
                text = word if bare.kind is WORDS or len(bare_words) == 1 else shlex.join(bare_words)
                yield bare.name, bare.parse(text, text), text
            else:
                yield from read_settings_file(block, word)
            continue
        flag, equals, text = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        name = name if flag.startswith("--") else block.short.get(name, name)
        positive = name.removeprefix("no_")
        if name not in block.settings and positive in block.settings and block.settings[positive].kind.type is bool:
            if equals:
                raise UserError(f"{word}: expected {flag} or --{flag.removeprefix('--no-')}={text}")
            yield positive, False, flag
            continue
        setting = block.find(name, word)
        if not equals and setting.kind.type is bool:
            if words and words[0].lower() in TRUTH:
                raise UserError(f"{flag} {words[0]}: a value for a bool is not spaced; write {flag}={words[0]}")
            text = "true"
        elif not equals:
            if not words or OPTION.fullmatch(words[0]):
                about = f"{setting.type_name}, default {setting.default!r}"
                raise UserError(f"{flag} needs a value: {flag}=VALUE ({about})")
            text = words.pop(0)
        yield name, setting.parse(text, f"{flag}={text}"), flag


def parse_args(block: Block, argv: Sequence[str]) -> dict[str, tuple[object, str]]:
    """{name: (value, where it was given)} of a command line; later wins, also over its rivals. UserError for the first
    word that is wrong, and for rivals in the same place.
    """
    given: dict[str, tuple[object, str]] = {}
    for name, value, origin in read_words(block, argv):
        for rival in block.rivals(name) - {name} if value is not None else ():
            other, place = given.get(rival, (None, ""))
            if other is not None:
                if place.rpartition(":")[0] == origin.rpartition(":")[0]:  # both flags, or both lines of one file
                    raise UserError(
                        f"{place} and {origin}: give at most one of {', '.join(sorted(block.rivals(name)))}"
                    )
                given[rival] = None, origin
        given[name] = value, origin
    return given


def help_text(block: Block) -> str:
    """The script's docstring, then every setting under its section: name, type, default, what it does."""
    letters = {name: f"-{letter}, " if letter else f"{name.upper()}, " for letter, name in block.short.items()}
    rows = [
        (f"  {letters.get(name, '')}--{name.replace('_', '-')}", setting.type_name, repr(setting.default))
        for name, setting in block.settings.items()
    ]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    width = max(shutil.get_terminal_size((120, 24)).columns, sum(widths) + 40)
    forms = "Settings: --name=value, --name value, or a file of `name = value` lines; the last one wins."
    lines = [block.doc, "", forms]
    for section, group in groupby(zip(rows, block.settings.values(), strict=True), key=lambda pair: pair[1].section):
        lines += ["", section]
        for row, setting in group:
            head = "".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True))
            lines.append(textwrap.fill(head + setting.help, width, subsequent_indent=" " * sum(widths)))
    return "\n".join(lines).lstrip()


def configure(module_name: str, status: TextIO | None = None) -> dict[str, object]:
    """All settings of the calling module, {name: value}; `settings = configure(__name__)` stands right under its block.

    When the module is `__main__`, sys.argv is applied first: the module's variables are set, and rank 0 prints each
    override with its origin to `status` (stdout if None). --help prints the settings and exits 0; a mistake is printed
    by rank 0 and exits 2 on all ranks, with nothing assigned. When it is imported, the defaults are returned and
    nothing else happens.
    """
    module = sys.modules[module_name]
    path = Path(str(module.__file__))
    if module_name != "__main__":
        return {name: setting.default for name, setting in read_block(path).settings.items()}
    for stream in (sys.stdin, sys.stdout):  # that a terminal cannot show a character ends no run; stderr escapes them
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        block = read_block(path)
        if {"--help", "-h"} & set(sys.argv[1:]):
            print0(help_text(block))
            sys.exit(0)
        given = parse_args(block, sys.argv[1:])
        tempfile.gettempdir()  # torch needs one while it is imported
    except (UserError, FileNotFoundError) as error:
        none = "; make room there, or name another one: export TMPDIR=DIR" if isinstance(error, OSError) else ""
        say_why(f"{error}{none}", everywhere=True)
        sys.exit(2)
    for name, (value, origin) in given.items():
        setattr(module, name, value)
        GIVEN.add(name)
        print0(f"{name} = {value!r} (from {origin}, default {block.settings[name].default!r})", file=status)
    return {name: getattr(module, name, setting.default) for name, setting in block.settings.items()}
