"""English text that is on this machine already: the documentation strings of Python's library and of our dependencies.

    python -m nanochat.dataset --source=docs

Each module becomes one document: what the module says about itself, then each class and function under a heading with
its name and arguments. reStructuredText is turned into plain prose: markup goes, formulas with it, wrapped lines are
joined, and paragraphs that are mostly symbols (tables, drawn formulas) are left out.

Promises: files are parsed, never imported; the same versions give the same documents in the same order; packages that
validate are not in training, nor is any text that appears in them; everything left out is counted. Does not: read
documentation that is compiled into C extensions, or any package outside the list below, whatever else is installed.
"""

import ast
import hashlib
import inspect
import itertools
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from nanochat.common import UserError, print0
from nanochat.corpus import load_corpus
from nanochat.corpus_writer import write_corpus

# Distributions that every install has, chosen for prose. No two may hold copies of each other (multiprocess is Python's
# multiprocessing again). What validates is of every kind, and 0.7 MB, because it is scored in full.
VALIDATION = ["mpmath", "fsspec", "click", "jinja2", "requests"]
NUMBERS = ["torch", "sympy", "networkx", "numpy", "pandas", "pyarrow", "safetensors"]
WEB = ["huggingface_hub", "datasets", "fastapi", "starlette", "urllib3", "idna", "markdown-it-py"]
TOOLS = ["pydantic", "anyio", "packaging", "filelock", "platformdirs", "python-dateutil", "dill", "tqdm", "cffi"]
PACKAGES = [*VALIDATION, *NUMBERS, *WEB, *TOOLS, "typing_extensions"]
MODULES = {"python-dateutil": "dateutil", "markdown-it-py": "markdown_it"}  # where the two names differ
NOT_DOCUMENTATION = {"test", "tests", "testing", "_vendor", "vendored", "third_party", "__pycache__"}
# Split off or missing in some Linux distributions, which would change the text without changing Python's version.
NOT_EVERYWHERE = {"idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "distutils", "venv"}
SKIPPED_FOLDERS = NOT_DOCUMENTATION | NOT_EVERYWHERE | {"site-packages", "dist-packages"}
DOCUMENT_BYTES = 100_000  # a longer module is cut before a heading
SHORTEST_DOCUMENT = 200  # characters; below are lone one-liners
LETTERS = 0.65  # least share in a paragraph's visible characters: prose has 0.9, code 0.75, drawn formulas 0.3
ASCII = 0.97  # least share of ASCII in a document
VERSION_NOTES = {"versionadded": "New in", "versionchanged": "Changed in", "deprecated": "Deprecated since"}

Section = tuple[str, str]  # heading, raw documentation string


def build_docs(corpus: Path) -> dict[str, Any]:
    """Make the docs corpus, or return its manifest when it was made from the same versions and is whole."""
    places = find_packages()
    versions = package_versions(places)
    try:
        manifest = load_corpus(corpus.name).manifest
        if manifest["versions"] == {"pyarrow": pa.__version__, **versions}:
            print0(f"{corpus}: already made from these versions")
            return manifest
    except UserError:
        pass  # not there, or not whole
    absent = [package for package in PACKAGES if package not in places]
    print0(f"reading the docs of Python and {len(places) - 1} packages; not installed: {', '.join(absent) or 'none'}")
    sizes: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    about = {"source": "docs", "arguments": {}, "versions": versions, "absent": absent}
    about |= {"validation_packages": VALIDATION, "text_bytes_by_package": sizes, "left_out": left_out}
    manifest = write_corpus(corpus, collect_docs(places, VALIDATION, sizes, left_out), about)
    print0("MB by package: " + ", ".join(f"{package} {size / 1e6:.2f}" for package, size in sizes.most_common()))
    return manifest


def find_packages() -> dict[str, Path]:
    """Where each installed package of the list, and "python", has its files: a folder, or one .py file."""
    places = {}
    for package in PACKAGES:
        spec = find_spec(MODULES.get(package, package))  # of a top-level name: looks, does not import
        if spec and spec.origin:
            file = Path(spec.origin)
            places[package] = file.parent if file.name == "__init__.py" else file
    return places | {"python": Path(sysconfig.get_path("stdlib"))}


def package_versions(places: Collection[str]) -> dict[str, str]:
    """What the text depends on: the version of each package and of Python, and the hash of this file."""
    versions = {package: metadata.version(package) for package in places if package != "python"}
    extractor = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return versions | {"python": platform.python_version(), "extractor": extractor}


def collect_docs(
    places: dict[str, Path], validation: Collection[str], sizes: Counter[str], left_out: Counter[str]
) -> Iterator[tuple[bool, str]]:
    """Yield (is for validation, document); adds up bytes per package in `sizes` and reasons in `left_out`. Validation
    comes first, and a documentation string is used once, where it is met first: so what validates is never trained on.
    """
    seen: set[bytes] = set()
    for package in sorted(places, key=lambda package: package not in validation):
        for file, module in list_modules(package, places[package]):
            try:
                sections = read_sections(file, module)
            except (SyntaxError, ValueError):
                left_out["files that do not parse"] += 1
                continue
            for document in make_documents(sections, seen, left_out):
                sizes[package] += len(document.encode())
                yield package in validation, document


def list_modules(package: str, place: Path) -> Iterator[tuple[Path, str]]:
    """Yield (file, module name), sorted; of a folder all .py, .pyx and .pxi files outside tests and vendored copies."""
    if place.is_file():
        yield place, place.stem
        return
    base = place if package == "python" else place.parent
    files = [file for file in place.rglob("*.p*") if file.suffix in (".py", ".pyx", ".pxi")]
    for file in sorted(files, key=lambda file: file.relative_to(place).parts):
        if not SKIPPED_FOLDERS & set(file.relative_to(place).parts):
            parts = file.relative_to(base).with_suffix("").parts
            yield file, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# -----------------------------------------------------------------------------
# From a source file to sections


def read_sections(file: Path, module: str) -> list[Section]:
    """The documentation strings of one file with their headings; SyntaxError or ValueError where it is no Python."""
    text = file.read_text(encoding="utf-8")
    if '"""' not in text and "'''" not in text:
        return []
    if file.suffix != ".py":
        return cython_sections(text, module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's escapes
        tree = ast.parse(text)
    sections = [(f"module {module}", ast.get_docstring(tree) or "")]
    if module == "pydoc_data.topics":  # the language reference that help() shows
        return sections + topic_sections(tree)
    templates = docstring_templates(text)
    return sections + list(tree_sections(tree.body, module, templates))


def tree_sections(
    body: list[ast.stmt], owner: str, templates: dict[str, str], inside: str = "function"
) -> Iterator[Section]:
    """Yield the sections of classes, functions and add_docstr() calls, in order; not those inside functions."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{inside} {owner}.{node.name}({argument_names(node.args)})", ast.get_docstring(node) or ""
        elif isinstance(node, ast.ClassDef):
            yield f"class {owner}.{node.name}", ast.get_docstring(node) or ""
            yield from tree_sections(node.body, node.name, templates, "method")
        elif isinstance(node, ast.If | ast.Try):
            yield from tree_sections(node.body + node.orelse, owner, templates, inside)
        elif isinstance(node, ast.Assign | ast.Expr) and isinstance(node.value, ast.Call):
            yield from call_sections(node.value, owner, templates)


def argument_names(arguments: ast.arguments) -> str:
    """The names of a function's arguments as written in a call, without self: `a, b, *rest, key, **options`."""
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return ", ".join(name for name in names if name not in ("self", "cls"))


def call_sections(call: ast.Call, owner: str, templates: dict[str, str]) -> Iterator[Section]:
    """Yield the section of a call that documents a compiled function: torch's `add_docstr(torch.abs, "text {input}"
    .format(...))` and numpy's `add_newdoc("numpy.linalg", "name", ("method", "text"))`; nothing for other calls.
    """
    called = ast.unparse(call.func)
    if not re.search(r"add_?(doc|newdoc)", called) or len(call.args) < 2:
        return
    *named, last = call.args
    if isinstance(last, ast.Tuple) and len(last.elts) == 2:
        named, last = [*named, last.elts[0]], last.elts[1]
    text = literal_text(last, templates)
    if text is None:
        return
    subject = ".".join(literal_text(part) or ast.unparse(part) for part in named)
    text = re.sub(r"\A\s*\w+\([^\"]{0,800}?\n--\n", "", text)  # a signature in the form the C compiler's tools read
    yield f"function {subject if '.' in subject else f'{owner}.{subject}'}", inspect.cleandoc(text)


def literal_text(node: ast.expr | None, templates: dict[str, str] | None = None) -> str | None:
    """A string written out in the source, alone, added to others, or as "{name}".format(...); else None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = literal_text(node.left, templates), literal_text(node.right, templates)
        return None if left is None and right is None else (left or "") + (right or "")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        known, text = templates or {}, literal_text(node.func.value) or ""
        return re.sub(r"\{(\w+)\}|([{}])\2", lambda match: match[2] or known.get(match[1], ""), text)
    return None


def docstring_templates(text: str) -> dict[str, str]:
    """What torch's sources paste into many documentation strings: `name (type): text` in parse_kwargs(...)."""
    templates: dict[str, str] = {}
    for block in re.findall(r'parse_kwargs\(\s*r?"""(.*?)"""', text, re.DOTALL):
        for entry in re.split(r"\n    (?! )", block):
            templates.setdefault(entry.split(" ")[0], entry.strip())
    return templates


def topic_sections(tree: ast.Module) -> list[Section]:
    """The entries of a dict of strings."""
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    pairs = [(key, value) for table in tables for key, value in zip(table.keys, table.values, strict=True)]
    return [(f"topic {literal_text(key)}", literal_text(value) or "") for key, value in pairs if key]


def cython_sections(text: str, module: str) -> list[Section]:
    """Documentation strings of classes and functions in Cython, which ast cannot parse: found by their indentation."""
    pattern = r'^[ ]*(?:cdef |cpdef )?(class|def)\s+(\w+)[^"\n]*(?:\n[^"\n:]+)*?:\n\s+r?"""(.*?)"""'
    found = re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    kinds = {"class": "class", "def": "function"}
    return [(f"{kinds[match[1]]} {module}.{match[2]}", inspect.cleandoc(match[3])) for match in found]


# -----------------------------------------------------------------------------
# From sections to documents


def make_documents(sections: list[Section], seen: set[bytes], left_out: Counter[str]) -> Iterator[str]:
    """Clean the sections of one module and join them; cut before a heading where a document would exceed 100 KB."""
    parts: list[str] = []
    for heading, raw in sections:
        text = clean(raw, left_out)
        if not text:
            continue
        digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
        if digest in seen:
            left_out["repeated documentation strings"] += 1
            continue
        seen.add(digest)
        if sum(map(len, parts)) + len(text) > DOCUMENT_BYTES:
            yield from accept(parts, left_out)
            parts = []
        parts.append(f"{heading}\n\n{text}")
    yield from accept(parts, left_out)


def accept(parts: list[str], left_out: Counter[str]) -> Iterator[str]:
    """Yield the joined document, unless it is too short or not English."""
    if not parts:
        return
    document = "\n\n".join(parts)
    if len(document) < SHORTEST_DOCUMENT:
        left_out[f"modules with less than {SHORTEST_DOCUMENT} characters"] += 1
    elif sum(map(str.isascii, document)) < ASCII * len(document):
        left_out["documents not in ASCII"] += 1
    else:
        yield document + "\n"


def clean(raw: str, left_out: Counter[str]) -> str:
    """Plain prose from one documentation string; "" where nothing is left."""
    kept: list[str] = []
    for paragraph in filter(str.strip, re.split(r"\n\s*\n", strip_markup(raw))):
        visible = "".join(paragraph.split())
        if sum(map(str.isalpha, visible)) < LETTERS * len(visible):
            left_out["paragraphs of symbols"] += 1
            continue
        if kept and is_title(kept[-1]) and is_title(paragraph):
            kept.pop()  # what the title announced was left out
        kept.append(join_lines(paragraph))
    if kept and is_title(kept[-1]):
        kept.pop()
    return "\n\n".join(kept)


def is_title(paragraph: str) -> bool:
    """Whether a paragraph is only a few words and a colon, such as "Examples:"."""
    return re.fullmatch(r"\s*\w[\w ]{0,40}:\s*", paragraph) is not None


def strip_markup(text: str) -> str:
    """Take reStructuredText's marks away: underlines of titles, roles, double backquotes, directives (formulas and
    pictures with what they show).

    "Returns\\n-------\\n:class:`~torch.Tensor`: the ``value``::" becomes "Returns:\\n\\n`torch.Tensor`: the `value`:".
    """
    text = text.expandtabs().replace("\r\n", "\n")
    text = re.sub(r"(?m)^( *)\.\. (?:math|plot|image|figure|toctree|autosummary)::.*(?:\n\1 +.*|\n *$)*", "", text)
    text = re.sub(r"(?m)^( *)(\S.*?):?\n *([=\-~^*+#])\3{2,}$", r"\1\2:\n", text)
    text = re.sub(r":(?:\w+:)?\w+:`[~!]?([^`<]+?)(?:\s*<[^`>]*>)?`", r"`\1`", text)
    text = re.sub(r"(?m)^( *)\.\. (note|warning|tip|seealso|important)::", r"\1\2:", text)
    for directive, words in VERSION_NOTES.items():
        text = re.sub(rf"(?m)^( *)\.\. {directive}:: *(\S*)", rf"\1{words} version \2:", text)
    text = re.sub(r"(?m)^ *(?:\.\. [\w:-]+::.*|\.\. _.*|:\w+:\s*$)", "", text)
    text = re.sub(r"``([^`\n]+)``", r"`\1`", text)
    text = re.sub(r"([`\]])__?(?!\w)", r"\1", text)
    return re.sub(r"(?m)::$", ":", re.sub(r"(?m) +$", "", text))


def join_lines(paragraph: str) -> str:
    """Undo the wrapping of prose: a line continues one of 50 characters or more that is indented like it, unless it
    begins an entry or follows code.
    """
    lines = paragraph.strip("\n").split("\n")
    joined = [lines[0]]
    for above, line in itertools.pairwise(lines):
        alike = len(above) - len(above.lstrip()) == len(line) - len(line.lstrip())
        code = above.lstrip().startswith((">>>", "..."))
        words = re.match(r"\s*(?!\w+ ?(?:\(.*\))? ?:)[\w(`\"']", line)  # not "name : type"
        if alike and len(above) >= 50 and words and not code:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line)
    return "\n".join(joined)
