"""What the pages say holds: their commands, flags, values, links, names of files and functions, and their examples.

A block marked `console` is run, in the order of its page and in an empty base directory, and what it shows must be what
is printed; `...` stands for any text in a line, and alone for any lines. A page that is not about this project says so
in a table's head (`there`): that column is not looked at.
"""

import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from dev import settings_page
from nanochat.common import UserError
from nanochat.configurator import Block, parse_args, read_block
from tasks.common import message_text
from tests.test_commands import TUTORIAL_TASK, script_paths

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "CHANGELOG.md"})
FOREIGN = {"there", "nanoGPT"}  # heads of columns that show what other projects have
CODE = ("nanochat", "scripts", "tasks", "dev", "tests")  # folders with modules of ours
LAUNCHER = re.compile(r"(speedrun|run1000|launch_\w+|(mini)?series|scaling_laws|runcpu)\.sh$")
PROGRAMS = set(
    "cat cd cp curl docker export git head llama-cli pip scontrol source sudo tail uv vllm wandb xdg-open".split()
)
# Flags that are not ours: of srun and sbatch, torchrun, docker, vLLM, pip, uv.
OTHERS = set(
    """
    --account --cpus-per-task --export --gpu-bind --gpus-per-node --kill-on-bad-exit --mem --nodes --ntasks-per-node
    --partition --signal --time --master_addr --master_port --nnodes --node_rank --nproc_per_node --standalone
    --extra --group-add --device --model-impl --require-hashes --help -h -9 -k -m
    """.split()
)
# Files that a run or the user makes, and other projects' programs.
MADE = set("gpu.md report.md compare.md next_number.py capitals.py mine.py".split())
DATA = (".html", ".json", ".jsonl", ".csv", ".svg", ".png", ".bin", ".txt", ".pkl", ".parquet", ".safetensors", ".log")
NOT_OURS = {"ChildFailedError", "log_interval"}  # names


# -----------------------------------------------------------------------------
# A page in pieces


class Piece(NamedTuple):
    """A part of a page with its line: `fence` (info says which language), `code`, `link` or `heading`."""

    kind: str
    text: str
    line: int
    info: str = ""


def pieces(text: str) -> Iterator[Piece]:
    """All of them but those of a column of other projects."""
    line, column, foreign = 0, 0, set[int]()
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        line = token.map[0] + 1 if token.map else line
        match token.type:
            case "table_open":
                foreign = set()
            case "tr_open":
                column = 0
            case "th_close" | "td_close":
                column += 1
            case "fence":
                yield Piece("fence", token.content, line, token.info)
            case "inline" if column not in foreign:
                yield from inline_pieces(token, line)
                if token.content in FOREIGN and token.level == 4:
                    foreign.add(column)
            case "heading_open":
                yield Piece("heading", text.splitlines()[line - 1].lstrip("# "), line)
            case "table_close":
                foreign, column = set(), 0


def inline_pieces(token: Token, line: int) -> Iterator[Piece]:
    for child in token.children or []:
        if child.type == "code_inline":
            yield Piece("code", child.content, line)
        elif child.type in ("link_open", "image"):
            yield Piece("link", str(child.attrs.get("href") or child.attrs.get("src")), line)


def anchors(text: str) -> set[str]:
    """Those that a forge makes of the headings of a page."""
    found: list[str] = []
    for piece in pieces(text):
        if piece.kind == "heading":
            slug = re.sub(r"[^\w\- ]", "", piece.text.lower()).replace(" ", "-")
            found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


# -----------------------------------------------------------------------------
# What there is


@cache
def source() -> str:
    """Everything that is no page: a name that does not occur in it is none of ours."""
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    paths = [ROOT / file for file in files if not file.endswith((".md", ".json", ".png")) and (ROOT / file).is_file()]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if path != Path(__file__))


@cache
def words() -> set[str]:
    return set(re.findall(r"\w+", source()))


@cache
def names() -> set[str]:
    """Names of all files, with and without their folders."""
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    return {part for file in files if (ROOT / file).exists() for part in (file, Path(file).name)}


@cache
def members(path: Path) -> dict[str, set[str]]:
    """{class, or "" for the module: names that stand in it}."""
    found: dict[str, set[str]] = {"": set()}
    for start in re.split(r"^(?=\S)", path.read_text(encoding="utf-8"), flags=re.MULTILINE):  # one statement each
        head, _, body = start.partition("\n")
        found[""] |= set(re.findall(r"\w+", head.partition("=")[0].partition("(")[0]))
        if head.startswith("class "):
            found[re.findall(r"\w+", head)[1]] = set(re.findall(r"\w+", body))
    return found


@cache
def modules() -> dict[str, list[Path]]:
    """{module or folder.module: files of that name}."""
    found: dict[str, list[Path]] = {}
    for folder in CODE:
        for path in (ROOT / folder).glob("*.py"):
            for name in (path.stem, f"{folder}.{path.stem}"):
                found.setdefault(name, []).append(path)
    return found


@cache
def classes() -> dict[str, set[str]]:
    """{class: what stands in all of that name}."""
    found: dict[str, set[str]] = {}
    for path in {path for paths in modules().values() for path in paths}:
        for name, inside in members(path).items():
            found[name] = found.get(name, set()) | inside
    return found


@cache
def blocks() -> dict[str, Block]:
    return {module: read_block(path) for module, path in script_paths().items()}


@cache
def documented_variables() -> set[str]:
    return set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (ROOT / "docs/reference/environment.md").read_text("utf-8")))


# -----------------------------------------------------------------------------
# What is wrong with a page


def problems(page: Path, text: str) -> list[str]:
    """A line for everything in a page that does not hold; the page need not exist."""
    found = []
    for piece in pieces(text):
        check = {"fence": wrong_in_block, "code": wrong_code, "link": wrong_link, "heading": lambda *_: []}[piece.kind]
        found += [f"{page.name}:{piece.line}: {why}" for why in check(page, piece)]
    return found


def wrong_link(page: Path, piece: Piece) -> Iterator[str]:
    address, _, anchor = piece.text.partition("#")
    if re.match(r"\w+:", address):
        return
    target = (page.parent / address).resolve() if address else page
    if not target.exists():
        yield f"there is no {address}"
    elif anchor and anchor not in anchors(target.read_text(encoding="utf-8") if address else page.read_text("utf-8")):
        yield f"{address} has no heading #{anchor}"


def wrong_in_block(page: Path, piece: Piece) -> Iterator[str]:
    if piece.info == "console":
        yield from wrong_commands("\n".join(command for command, _ in console(piece.text)))
    elif piece.info == "bash":
        checked = subprocess.run(["bash", "-n"], input=piece.text, capture_output=True, text=True)
        yield from checked.stderr.splitlines() or wrong_commands(piece.text)
    elif piece.info == "python":  # ruff format looks at the rest of it
        for module, listed in re.findall(r"^from ([\w.]+) import (.+)", piece.text, re.MULTILINE):
            for name in re.findall(r"\w+", listed) if module.partition(".")[0] in CODE else ():
                yield from wrong_name(f"{module}.{name}", called=False)
    elif piece.info not in ("", "json", "mermaid"):
        yield f"a block of {piece.info}: expected bash, console, python, json, mermaid or nothing"


def wrong_code(page: Path, piece: Piece) -> Iterator[str]:
    text = piece.text
    if re.match(r"(python|bash|sbatch|torchrun|srun|export) |[A-Z][A-Z_]+=\S* \w", text):
        yield from wrong_commands(text)
    elif re.match(r"--?[a-z]", text):
        yield from wrong_flags(text)
    elif re.fullmatch(r"[\w./-]+\.(py|sh|md|rs|toml|slurm)", text):
        local = text.removeprefix("../")
        if local not in names() and Path(text).name not in MADE and not (page.parent / text).exists():
            yield f"there is no file {text}"
    elif re.match(rf"({'|'.join(CODE)}|docs|docker|rustbpe)/[\w./-]*$", text):
        if not (ROOT / text).exists():
            yield f"there is no {text}"
    elif re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(.*\))?", text) and not text.endswith(DATA):
        yield from wrong_name(text.partition("(")[0], called=text.endswith(")"))


def wrong_name(name: str, called: bool) -> Iterator[str]:
    """A function, class or setting of ours that there is not: `module.name`, `Class.name`, `long_name`, `name()`."""
    parts = name.split(".")
    head = 2 if ".".join(parts[:2]) in modules() else 1
    module = ".".join(parts[:head])
    if len(parts) == 1:
        looked_for = called or "_" in name or re.search(r"[a-z][A-Z]", name)
        if looked_for and name not in words() | documented_variables() | NOT_OURS:
            yield f"there is no {name}"
    elif parts[0] in CODE and head == 1:
        yield f"there is no {name}"
    elif module in modules():
        for path in modules()[module]:
            inside, rest = members(path), parts[head:]
            owner = rest[0] if rest and rest[0] in inside else ""
            if not rest or (rest[0] in inside[""] and (len(rest) == 1 or rest[1] in inside.get(owner, set()))):
                return
        yield f"there is no {'.'.join(parts[head:])} in {module}"
    elif parts[0] in classes() and parts[1] not in classes()[parts[0]]:
        yield f"{parts[0]} has no {parts[1]}"


def wrong_flags(text: str) -> Iterator[str]:
    """Flags that stand alone: some script has each, and takes its value; capitals are the reader's value."""
    for flag, value in re.findall(r"(?<!\S)(--?[\w-]+)(?:[= ](?!-)(\S+))?", text):
        name = flag.lstrip("-").replace("-", "_")
        having = [block for block in blocks().values() if name in block.settings or name in block.short]
        if flag in OTHERS or having and not re.search("[a-z0-9]", value):
            continue
        whys = [f"no setting named {name}"]
        for block in having:
            try:
                parse_args(block, [f"{flag}={value}"])
                whys = []
                break
            except UserError as error:
                whys = [str(error)]
        yield from whys


def wrong_commands(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").replace(TUTORIAL_TASK, "GSM8K").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if re.fullmatch(r"[();<>|&]+", word):
                if "<" not in word and ">" not in word:
                    yield from wrong_command(command)
                    command = []
            else:
                command.append(word)


def wrong_command(command: list[str]) -> Iterator[str]:
    """What is wrong with one command: variables, program, file, flags."""
    while command and (command[0] == "export" or re.match(r"\w+=", command[0])):
        name, equals, _ = command.pop(0).partition("=")
        if equals and name not in documented_variables() | {"NAME"}:
            yield f"{name} is not in docs/reference/environment.md"
    if not command:
        return
    program, *rest = command
    if program == "python" and rest and rest[0] != "-m":
        if not rest[0].startswith("-") and rest[0] not in names():
            yield f"there is no file {rest[0]}"
    elif program in ("python", "torchrun") or "-m" in rest and program == "srun":
        start = rest.index("-m")
        module, given = rest[start + 1], rest[start + 2 :]
        yield from (f"{program} has no {word}" for word in rest[:start] if not_others(word))
        if module not in modules():
            if module not in ("pip", "pytest", "venv"):
                yield f"there is no {module}"
        elif module in blocks() and not {"-h", "--help"} & set(given):
            try:
                parse_args(blocks()[module], given)
            except UserError as error:
                yield f"{module}: {error}"
    elif program in ("bash", "sbatch", "srun", "sh"):
        files = [word for word in rest if not word.startswith("-")]
        if not files:
            return
        yield from (f"{program} has no {word}" for word in rest[: rest.index(files[0])] if not_others(word))
        yield from [] if files[0] in names() else [f"there is no file {files[0]}"]
        if LAUNCHER.search(files[0]) and set(rest[1:]) - {"--help", "-h"}:
            yield f"{files[0]} takes variables and no {' '.join(rest[1:])}"
    elif program not in PROGRAMS:
        yield f"{program} is no program that the pages know"


def not_others(word: str) -> bool:
    return word.startswith("--") and word.partition("=")[0] not in OTHERS


# -----------------------------------------------------------------------------
# The pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_holds(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # settings files are given relative to it
    assert problems(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a dead link](nowhere.md)", "there is no nowhere.md"),
        ("[a dead anchor](docs/explanation/walk.md#no-such-heading)", "has no heading #no-such-heading"),
        ("# Here\n\n![a dead picture](docs/none.svg)", "page.md:3: there is no docs/none.svg"),
        ("`python -m scripts.base_train --depht=4`", "no setting named depht (--depht=4). Did you mean depth?"),
        ("```bash\npython -m scripts.base_train \\\n  --depth=none\n```", "--depth=none: expected int >= 1"),
        ("```bash\nsource x && python -m scripts.nothing\n```", "there is no scripts.nothing"),
        ("```bash\nSTAGE=sft bash speedrun.sh\n```", "STAGE is not in docs/reference/environment.md"),
        ("```bash\nbash speedrun.sh --depth=4\n```", "speedrun.sh takes variables and no --depth=4"),
        ("```bash\nbash dev/nothing.sh\n```", "there is no file dev/nothing.sh"),
        ("```bash\ntorchrun --nprocs=8 -m scripts.base_train\n```", "torchrun has no --nprocs=8"),
        ("```bash\nif true\n```", "syntax error"),
        ("```bash\nfrobnicate\n```", "frobnicate is no program"),
        ("```pyhton\nx = 1\n```", "a block of pyhton"),
        ("```python\nfrom nanochat.engine import Engin\n```", "there is no Engin in nanochat.engine"),
        ("a flag alone: `--save-bset`", "no setting named save_bset"),
        ("a value alone: `--schedule=cosin`", "--schedule=cosin: expected one of"),
        ("`nanochat/nothing.py`", "there is no file nanochat/nothing.py"),
        ("`nothing.py`", "there is no file nothing.py"),
        ("`tests/nothing/`", "there is no tests/nothing/"),
        ("`corpus.load_corpse`", "there is no load_corpse in corpus"),
        ("`gpt.GPT.hiden`", "there is no GPT.hiden in gpt"),
        ("`scripts.nothing`", "there is no scripts.nothing"),
        ("`GPT.hiden`", "GPT has no hiden"),
        ("`head_loss_slices`", "there is no head_loss_slices"),
        ("`frobnicate()`", "there is no frobnicate"),
        ("| there | here |\n|---|---|\n| `--max_iters` | `--max-itres` |", "no setting named max_itres"),
    ],
)
def test_what_does_not_hold_is_found(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above: a check that finds nothing passes."""
    monkeypatch.chdir(ROOT)
    found = problems(ROOT / "page.md", text)
    assert len(found) == 1 and said in found[0], found


def test_every_page_is_led_to() -> None:
    """From the README, by links."""
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        links = [piece.text.partition("#")[0] for piece in pieces(page.read_text("utf-8")) if piece.kind == "link"]
        targets = {(page.parent / link).resolve() for link in links if link.endswith(".md") and ":" not in link}
        waiting += targets & set(PAGES) - seen
    assert set(PAGES) - seen == set()


def test_code_names_pages_that_there_are() -> None:
    named = set(re.findall(r"docs/[\w/-]+\.(?:md|svg|png)", source())) - {"docs/reference/gpu.md"}  # a card makes it
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_words_are_spelled_as_a_dictionary_has_them() -> None:
    """Add what is right to ignore-words-list in pyproject.toml."""
    files = [str(path.relative_to(ROOT)) for path in PAGES]
    command = [
        sys.executable,
        "-m",
        "codespell_lib",
        "--skip=tests/test_docs.py",
        *files,
        "CHANGELOG.md",
        *CODE,
        "rustbpe/src",
        "docker",
    ]
    checked = subprocess.run([*command, *map(str, ROOT.glob("*.sh"))], cwd=ROOT, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


# -----------------------------------------------------------------------------
# The reference


def test_the_page_of_all_settings_is_what_the_scripts_say() -> None:
    """An undocumented setting is one that is not on it. Make it anew: python -m dev.settings_page"""
    page = (ROOT / settings_page.page).read_text(encoding="utf-8")
    assert page == settings_page.make(script_paths())


def test_a_new_setting_is_missed_on_the_page(tmp_path: Path) -> None:
    script = tmp_path / "plan.py"
    script.write_text((ROOT / "scripts/plan.py").read_text("utf-8").replace("\ndepth:", "\nnew = False  # new\ndepth:"))
    assert "`--new`" in settings_page.make({**script_paths(), "scripts.plan": script})
    assert "`--new`" not in (ROOT / settings_page.page).read_text(encoding="utf-8")


def test_environment_variables_on_their_page_are_those_that_are_read() -> None:
    python = [path for folder in ("nanochat", "scripts", "tasks") for path in ROOT.glob(f"{folder}/*.py")]
    shell = [*ROOT.glob("*.sh"), *ROOT.glob("dev/**/*.s[hl]*")]
    pattern = re.compile(r"environ(?:\.get\(|\[)[\"']([A-Z_]+)[\"']|\$\{([A-Z]\w*):?-")
    found = [pattern.findall(path.read_text("utf-8")) for path in [*python, *shell]]
    read = {name for names in found for pair in names for name in pair if name}
    tuned = re.compile("(NCCL|RCCL|HSA|TORCH_ROCM)_")  # launch_6x_amd_xtx.sh says what each is for
    left_out = {
        "CXX",
        "CARGO_HOME",
        "LD_LIBRARY_PATH",
        "PYTHONPATH",
        "TERM",
        "TORCHINDUCTOR_COMPILE_THREADS",
        "VIRTUAL_ENV",
    }
    read -= left_out | {name for name in read if tuned.match(name)}
    assert {name for name in read if not name.startswith("SLURM_")} - documented_variables() == set()
    ours = (ROOT / "docs/reference/environment.md").read_text("utf-8").partition("## Of others")[0]
    assert set(re.findall(r"`([A-Z][A-Z0-9_]+)`", ours)) - words() == set()


# -----------------------------------------------------------------------------
# Examples that are run


def console(text: str) -> list[tuple[str, str]]:
    """(command, what it prints) of a block."""
    return [(part.partition("\n")[0], part.partition("\n")[2]) for part in re.split(r"^\$ ", text, flags=re.M)[1:]]


def examples() -> Iterator[tuple[Path, list[tuple[str, str]]]]:
    for page in PAGES:
        found = [piece for piece in pieces(page.read_text("utf-8")) if piece.info == "console"]
        if found:
            yield page, [example for piece in found for example in console(piece.text)]


def run(command: str) -> str:
    """What a command prints: a module in this process, which has torch already, anything else by bash."""
    if not command.startswith("python -m ") or " -m tests." in command:  # which pytest loads in its own way
        known = {name: os.environ[name] for name in ("HOME", "NANOCHAT_BASE_DIR") if name in os.environ}
        known["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        bash = subprocess.run(["bash", "-c", f"{command} 2>&1"], cwd=ROOT, env=known, stdout=subprocess.PIPE, text=True)
        return bash.stdout
    module, *given = shlex.split(command, comments=True)[2:]
    before, printed = sys.argv, io.StringIO()
    sys.argv = [module, *given]
    try:
        with redirect_stdout(printed), redirect_stderr(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that another test has imported it
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit:
        pass
    finally:
        sys.argv = before
    return printed.getvalue()


@pytest.mark.parametrize(
    ("page", "shown"), list(examples()), ids=lambda value: value.stem if isinstance(value, Path) else ""
)
def test_examples_print_what_their_page_shows(
    page: Path, shown: list[tuple[str, str]], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(
        "HF_HUB_OFFLINE", "1"
    )  # which is set for `-a list`, too late where an earlier test has the hub's
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # client imported: it asked, for half a minute
    for command, output in shown:
        lines = [re.escape(line).replace(r"\.\.\.", ".*") + "\n" for line in output.strip("\n").splitlines()]
        pattern = "".join(r"(?:.*\n)*?" if line == ".*\n" else line for line in lines)
        printed = run(command).strip("\n").replace(str(base_dir), "BASE") + "\n"
        assert re.fullmatch(pattern, printed), f"{page.name}: {command} prints\n{printed}"


def test_the_task_of_the_tutorial_is_one() -> None:
    """Its page is the only place of it."""
    page = (ROOT / "docs/tutorials/ability.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(next(piece.text for piece in pieces(page) if piece.info == "python"), names)
    splits = {split: names["NextNumber"](split, size=50) for split in ("train", "dev", "test")}
    asked = {split: {item["messages"][0]["content"] for item in task} for split, task in splits.items()}
    assert not asked["train"] & asked["test"] and len(asked["test"]) > 40
    item = splits["test"][0]
    assert splits["test"].evaluate(item, message_text(item["messages"][-1]))
    assert not splits["test"].evaluate(item, "#### 0")
