"""Every command line that we show is one that works, and a setting means the same in every script."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev import settings_page
from dev.settings_page import scripts as script_paths
from nanochat.common import UserError
from nanochat.configurator import parse_args, read_block

ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"-m ((?:scripts|nanochat|dev)\.\w+)([^`\n]*)")
TUTORIAL_TASK = "NextNumber"  # which docs/tutorials/ability.md adds
HEAVY = {"torch", "numpy", "pyarrow", "datasets", "wandb", "transformers", "rustbpe"}

# What users of nanochat and nanoGPT type.
KNOWN = """
-m nanochat.dataset -n 240
-m nanochat.dataset -n -1
-m nanochat.report reset
-m nanochat.report generate
-m scripts.tok_train --max_chars=2000000000 --vocab_size=65536
-m scripts.tok_train --max-chars=2000000000 --vocab-size=65536
-m scripts.tok_eval
-m scripts.base_train -- --depth=20 --run=dummy --target-param-data-ratio=20
-m scripts.base_train --depth=4 --max_seq_len=512 --device_batch_size=1 --total_batch_size=512 --num_iterations=20
-m scripts.base_train --target-flops=1e18 --embedding-lr=0.2 --unembedding-lr=0.004 --matrix-lr=0.02 --weight-decay=0
-m scripts.base_train --warmup-ratio=0 --warmdown-ratio=0.4 --final-lr-frac=0 --eval-every=250 --eval-tokens=1000
-m scripts.base_train --sample-every=1 --save-every=-1 --resume-from-step=5 --model-tag=x --window-pattern=SSSL
-m scripts.base_train --aspect-ratio=64 --head-dim=128 --device-type=cpu
-m scripts.base_train dev/configs/laptop.py --num-iterations=100 --target-flops=-1
-m scripts.base_loss --device_batch_size=1 --split_tokens=4096
-m scripts.chat_cli -p "Why is the sky blue?"
-m scripts.mid_train --dry-run --device_batch_size=16 --run=dummy
-m scripts.chat_sft --device_batch_size=4 --run=dummy --model-tag=d20
-m scripts.chat_rl -- --run=dummy
-m scripts.chat_eval -- -i sft -a GSM8K
-m scripts.chat_eval --source=mid --max-new-tokens=128 --max-problems=20
-m scripts.chat_web
-m scripts.chat_web -i rl -t 0.5 -k 10 -m 64 -p 8080 --num-gpus=1
-m scripts.chat_cli -i mid -t 0 -g d20 -s 100
"""


def sources() -> Iterator[tuple[str, str]]:
    """(where, text) of everything that shows commands. Of a shell script the comments: test_launchers.py runs it."""
    yield "KNOWN", KNOWN
    for pattern in ("*.md", "docs/**/*.md", "dev/configs/*.py"):
        for path in sorted({*ROOT.glob(pattern)} - {ROOT / settings_page.page}):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.sh"), *ROOT.glob("dev/**/*.s[hl]*"), *ROOT.glob("docker/*")]):
        lines = path.read_text(encoding="utf-8").splitlines()
        yield str(path.relative_to(ROOT)), "\n".join(line for line in lines if line.startswith("#"))
    for folder in ("nanochat", "scripts", "tasks", "dev"):
        for path in sorted((ROOT / folder).glob("*.py")):
            yield str(path.relative_to(ROOT)), ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def commands() -> list[tuple[str, str, list[str]]]:
    """(where, module, arguments) of every command."""
    found = []
    for where, text in sources():
        for module, rest in COMMAND.findall(text.replace("\\\n", " ").replace(TUTORIAL_TASK, "GSM8K")):
            lexer = shlex.shlex(rest, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
            end = next((i for i, word in enumerate(words) if re.fullmatch(r"[();<>|&]+", word)), len(words))
            found.append((where, module, words[:end]))
    return found


@pytest.mark.parametrize(("where", "module", "words"), commands())
def test_every_command_we_show_parses(
    where: str, module: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # settings files are given relative to it
    paths = script_paths()
    assert module in paths, f"{where}: there is no {module}"
    if words not in (["--help"], ["-h"]):
        parse_args(read_block(paths[module]), words)


def test_commands_are_found_where_they_are_shown() -> None:
    """Guards the test above: it would pass if the search found nothing."""
    places = {where for where, _, _ in commands()}
    assert {"README.md", "speedrun.sh", "dev/configs/laptop.py", "scripts/base_train.py"} <= places
    assert ("speedrun.sh", "nanochat.dataset", ["-n", "240"]) in commands()


def test_a_setting_has_the_same_type_in_every_script() -> None:
    """And a comment, and a range of its numbers: read_block() refuses a block where one is missing."""
    kinds: dict[str, tuple[str, type]] = {}
    for module, path in script_paths().items():
        for name, setting in read_block(path).settings.items():
            first, kind = kinds.setdefault(name, (module, setting.kind.type))
            assert kind is setting.kind.type, f"{name} is {kind} in {first}, {setting.kind.type} in {module}"


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        *(("scripts.base_train", f"--{flag}") for flag in ("seed=-1", "warmup-ratio=20", "warmdown-ratio=-1")),
        *(("scripts.base_train", f"--{flag}") for flag in ("matrix-lr=-0.02", "kv-heads=0", "eval-tokens=0")),
        *(("scripts.base_train", f"--{flag}") for flag in ("core-metric-max-per-task=0", "depth=0", "keep-last=0")),
        *(("scripts.base_train", f"--{flag}") for flag in ("num-iterations=0", "minutes=0", "device-batch-size=0")),
        *(("scripts.base_loss", f"--{flag}") for flag in ("device-batch-size=0", "split-tokens=-1")),
        ("scripts.base_eval", "--max-per-task=0"),
        ("scripts.chat_cli", "--max-tokens=0"),
        ("scripts.chat_cli", "--top-p=2"),
        *(("scripts.chat_eval", flag) for flag in ("-x=-2", "-n=0", "-m=-1", "-t=-1", "-b=0")),
        ("scripts.chat_rl", "--num-samples=1"),
        ("scripts.chat_web", "--port=70000"),
        ("scripts.plan", "--dollars-per-hour=-2"),
        ("scripts.tok_train", "--max-chars=-1"),
        *(("nanochat.dataset", flag) for flag in ("-n=0", "--workers=0", "--val-fraction=1.0")),
        *(("dev.gen_identity", f"--{flag}") for flag in ("num-train=0", "two-turns=1.5")),
        *(("dev.gen_synthetic_data", f"--{flag}") for flag in ("num=0", "workers=0")),
        ("dev.repackage_data", "--shard-chars=0"),
    ],
)
def test_a_number_that_means_nothing_is_refused_before_anything_is_done(module: str, flag: str) -> None:
    """They were tracebacks, nonsense, or numbers of nothing; some after hours."""
    with pytest.raises(UserError, match=f"^{flag}: expected .*(int|float)"):
        parse_args(read_block(script_paths()[module]), [flag])


def test_help_of_every_script_imports_nothing_heavy() -> None:
    """--help and every mistake must answer at once: torch alone takes seconds to import."""
    program = f"""
import runpy, sys
sys.argv[1:] = ["--help"]
for module in {sorted(script_paths())}:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(module, end.code, sorted(set(sys.modules) & {HEAVY}), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.splitlines() == [f"{module} 0 []" for module in sorted(script_paths())]


def test_a_setting_is_one_line() -> None:
    """A formatter breaks a line that is too long, and the most read lines of the project with it."""
    for script, path in script_paths().items():
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source.partition("\nsettings = configure(__name__")[0]).body:
            name = ast.unparse(node).split(maxsplit=1)[0].strip(":")
            if isinstance(node, ast.Assign | ast.AnnAssign) and name.islower():
                line = source.splitlines()[node.lineno - 1]
                assert node.lineno == node.end_lineno and "  # " in line, f"{script}: {name}"
