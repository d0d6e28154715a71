"""Settings: every form a user can type, every mistake, every way an author can write the block wrongly."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.configurator import FORMER_NAMES, help_text, parse_args, read_block

ROOT = Path(__file__).parent.parent
SCRIPT = '''"""A stage."""

from typing import Literal

from nanochat.configurator import Amount, Interval, Positive, Rate, Share, configure

SHORT = {"i": "source", "p": "prompt", "n": "num_files", "q": "quiet"}

# -----------------------------------------------------------------------------
# Model
depth: Positive = 20  # number of layers
model_tag: str | None = None  # directory name (None = d<depth>)
source: Literal["base", "mid"] = "mid"  # where from
rows: Positive | Literal["auto"] = 32  # rows
num_files: Interval | None = None  # files
matrix_lr: Rate = 0.02  # Muon
tokens: Positive = 20 * 524288  # of text
warmup: Share = 0.0  # share of the run
save_every: Interval = -1  # steps
# Horizon: at most one of these three
steps: Positive | None = None  # how many
flops: Amount | None = None  # how much
minutes: Amount | None = (
    None  # training time
)
counts: Literal["all", "some"] = "all"  # what a ratio counts
# Other
prompt = ""  # text, with = and # in it
compile = True  # or eager
quiet = False  # say nothing
_private = 1
CONSTANT = 2
settings = configure(__name__)

later = 3


def main() -> None:
    print(sorted(settings.items(), key=str) == sorted({name: globals()[name] for name in settings}.items(), key=str))
    print(f"{depth=} {source=} {prompt=}")


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "stage.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def values(script: Path, *argv: str) -> dict[str, object]:
    return {name: value for name, (value, _) in parse_args(read_block(script), argv).items()}


def refusal(script: Path, *argv: str) -> str:
    with pytest.raises(UserError) as error:
        values(script, *argv)
    message = str(error.value)
    assert "\n" not in message
    return message


def run(script: Path, *argv: str, rank: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "RANK": rank, "PATH": ""}
    return subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True, env=environment)


def test_block_is_what_stands_above_configure(script):
    settings = read_block(script).settings
    assert list(settings) == (
        "depth model_tag source rows num_files matrix_lr tokens warmup save_every steps flops minutes counts prompt "
        "compile quiet".split()
    )
    assert settings["tokens"].default == 10485760
    assert settings["minutes"].help == "training time"  # ruff moves a long comment inside parentheses
    assert settings["depth"].section == "Model"
    assert settings["minutes"].section == "Horizon: at most one of these three"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--depth=4"], {"depth": 4}),
        (["--depth", "4"], {"depth": 4}),
        (["--depth=2_000_000"], {"depth": 2000000}),
        (["--model-tag=d4"], {"model_tag": "d4"}),
        (["--model_tag=d4"], {"model_tag": "d4"}),
        (["--model_tag", "d4"], {"model_tag": "d4"}),
        (["--model-tag=4"], {"model_tag": "4"}),
        (["--model-tag=None"], {"model_tag": None}),
        (["--prompt=None"], {"prompt": "None"}),
        (["--rows=auto", "--model-tag=auto"], {"rows": "auto", "model_tag": "auto"}),
        (["--rows=auto", "--rows=4"], {"rows": 4}),
        (["--prompt="], {"prompt": ""}),
        (["--prompt", ""], {"prompt": ""}),
        (["--prompt=a=b # c"], {"prompt": "a=b # c"}),
        (["-p", "- a list"], {"prompt": "- a list"}),
        (["-p=-dash"], {"prompt": "-dash"}),
        (["-p", "two\nlines"], {"prompt": "two\nlines"}),
        (["-i", "base"], {"source": "base"}),
        (["-i=base"], {"source": "base"}),
        (["-n", "8"], {"num_files": 8}),
        (["-n", "-1"], {"num_files": -1}),
        (["--num-files", "-1"], {"num_files": -1}),
        (["--matrix-lr=1"], {"matrix_lr": 1.0}),
        (["--matrix-lr=1e-3"], {"matrix_lr": 0.001}),
        (["--matrix-lr", "0"], {"matrix_lr": 0.0}),
        (["--warmup=1"], {"warmup": 1.0}),
        (["--save-every=-1"], {"save_every": -1}),
        (["--steps", "-1", "--minutes=-1.0"], {"steps": None, "minutes": None}),  # as older command lines say it
        (["--steps=5", "--minutes=None", "--flops=-1"], {"steps": 5, "minutes": None, "flops": None}),
        (["--minutes=6"], {"minutes": 6.0}),
        (["--quiet"], {"quiet": True}),
        (["-q"], {"quiet": True}),
        (["--quiet=True"], {"quiet": True}),
        (["--compile=false"], {"compile": False}),
        (["--compile=0"], {"compile": False}),
        (["--no-compile"], {"compile": False}),
        (["--no_compile", "--depth=3"], {"compile": False, "depth": 3}),
        (["--", "--depth=3", "--"], {"depth": 3}),
        (["--depth=3", "--depth=4"], {"depth": 4}),
        ([], {}),
    ],
)
def test_accepted_forms(script, argv, expected):
    given = values(script, *argv)
    assert given == expected
    assert [type(value) for value in given.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dept=3"], "no setting named dept (--dept=3). Did you mean depth? --help lists them all."),
        (["--zzz"], "no setting named zzz (--zzz). --help lists them all."),
        (["-x"], "no setting named x (-x). --help lists them all."),
        (
            ["--learning_rate=0.1"],
            "no setting named learning_rate (--learning_rate=0.1). Did you mean matrix_lr? --help",
        ),
        (["--later=4"], "no setting named later (--later=4)."),
        (["--CONSTANT=4"], "no setting named CONSTANT (--CONSTANT=4)."),
        (["--_private=4"], "no setting named _private (--_private=4)."),
        (["--settings=4"], "no setting named settings (--settings=4)."),
        (["--depth"], "--depth needs a value: --depth=VALUE (int >= 1, default 20)"),
        (["--depth", "--quiet"], "--depth needs a value: --depth=VALUE (int >= 1, default 20)"),
        (["--prompt", "-dash"], "--prompt needs a value: --prompt=VALUE (str, default '')"),
        (["--prompt", "--"], "--prompt needs a value: --prompt=VALUE"),
        (["--depth=abc"], "--depth=abc: expected int"),
        (["--depth="], "--depth=: expected int"),
        (["--depth=4.0"], "--depth=4.0: expected int"),
        (["--depth=True"], "--depth=True: expected int"),
        (["--depth=None"], "--depth=None: expected int"),
        (["--depth=0"], "--depth=0: expected int >= 1"),
        (["--depth", "-1"], "--depth=-1: expected int >= 1"),
        (["-n", "x"], "-n=x: expected int >= 1 or -1 or None"),
        (["-n", "0"], "-n=0: expected int >= 1 or -1 or None"),
        (["--save-every=-2"], "--save-every=-2: expected int >= 1 or -1"),
        (["--matrix-lr=-.1"], "--matrix-lr=-.1: expected 0 <= float < 1e9"),
        (["--matrix-lr=1e308"], "--matrix-lr=1e308: expected 0 <= float < 1e9"),  # was a traceback from Muon
        (["--warmup=20"], "--warmup=20: expected 0 <= float <= 1"),
        (["--warmup=nan"], "--warmup=nan: expected 0 <= float <= 1"),
        (["--minutes=0"], "--minutes=0: expected float > 0 or None"),
        (["--minutes=inf"], "--minutes=inf: expected float > 0 or None"),
        (["--steps=-2"], "--steps=-2: expected int >= 1 or None"),
        (["--steps=5", "--minutes=1"], "--steps and --minutes: give at most one of flops, minutes, steps"),
        (["--matrix-lr=fast"], "--matrix-lr=fast: expected 0 <= float"),
        (["--matrix-lr=nan"], "--matrix-lr=nan: expected 0 <= float"),
        (["--matrix-lr=1e999"], "--matrix-lr=1e999: expected 0 <= float"),
        (["--source=sft"], "--source=sft: expected one of base, mid"),
        (["--rows=all"], "--rows=all: expected int >= 1 or auto"),
        (["--depth=auto"], "--depth=auto: expected int"),
        (["--num-files=auto"], "--num-files=auto: expected int >= 1 or -1 or None"),
        (["--quiet=maybe"], "--quiet=maybe: expected bool"),
        (["--quiet", "false"], "--quiet false: a value for a bool is not spaced; write --quiet=false"),
        (["--no-compile=true"], "--no-compile=true: expected --no-compile or --compile=true"),
        (["--no-depth"], "no setting named no_depth (--no-depth)."),
        (["missing.py"], "cannot read settings file 'missing.py' (No such file or directory); settings are given as"),
        (["depth=4"], "cannot read settings file 'depth=4' (No such file or directory); did you mean --depth=4?"),
        (["/"], "cannot read settings file '/' (Is a directory)"),
    ],
)
def test_refused_forms(script, argv, message):
    assert refusal(script, *argv).startswith(message)


def test_settings_files_and_flags_apply_in_the_order_given(script, tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text(
        '"""Why."""\n# Model\ndepth: int = 2 * 3 - 1  # why\nmatrix_lr = 1\nmodel_tag = None\nquiet = True\n'
    )
    two.write_text("tokens = 2_000 * 10\ndepth = 7\nmatrix_lr = 1 / 4\nnum_files = -1\nprompt = 'a'  'b'\n")
    both = {"depth": 7, "matrix_lr": 0.25, "model_tag": None, "quiet": True}
    both |= {"tokens": 20000, "num_files": -1, "prompt": "ab"}
    assert values(script, str(one), str(two)) == both
    assert values(script, str(two), str(one)) == both | {"depth": 5, "matrix_lr": 1.0}
    assert values(script, str(one), "--depth=9")["depth"] == 9
    assert values(script, "--depth=9", str(one))["depth"] == 5
    origins = {name: origin for name, (_, origin) in parse_args(read_block(script), [str(one), "--quiet"]).items()}
    assert (origins["depth"], origins["quiet"]) == (f"{one}:3", "--quiet")


def test_a_horizon_on_the_command_line_replaces_that_of_a_settings_file(script, tmp_path):
    """base_train dev/configs/laptop.py --num-iterations=100 was refused."""
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("minutes = 5.0\nsteps = None\n")
    two.write_text("flops = 1e18\n")
    found = parse_args(read_block(script), [str(one), "--steps=100"])
    assert found == {"minutes": (None, "--steps"), "steps": (100, "--steps")}  # which is printed
    assert values(script, str(one), str(two), "--counts=some") == {
        "minutes": None, "steps": None, "flops": 1e18, "counts": "some",
    }  # fmt: skip
    assert values(script, str(one), "--minutes=6") == {"minutes": 6.0, "steps": None}
    assert "--steps and --flops: give at most one" in refusal(script, str(one), "--steps=1", "--flops=1")
    two.write_text("flops = 1e18\nsteps = 1\n")
    assert f"{two}:1 and {two}:2: give at most one" in refusal(script, str(two))


def test_a_settings_file_changes_its_base(script, tmp_path):
    """One level: the base first, whatever folder one stands in; then the file, then what comes later."""
    (tmp_path / "base.py").write_text('"""A base."""\ndepth = 4\nminutes = 3.0\nprompt = "of the base"\n')
    small = tmp_path / "small.py"
    small.write_text('# Smaller\nbase = "base.py"  # beside it\ndepth = 2\nsteps = 5\n')
    given = {"depth": 2, "prompt": "of the base", "steps": 5, "minutes": None}  # the two horizons are rivals
    assert values(script, str(small)) == given
    assert values(script, str(small), "--depth=7") == given | {"depth": 7}
    where = parse_args(read_block(script), [str(small)])["prompt"][1]
    assert where == f"{tmp_path / 'base.py'}:4"


@pytest.mark.parametrize(
    ("small", "base", "message"),
    [
        ('base = "base.py"', "dept = 4", "base.py:1). Did you mean depth?"),
        ('base = "base.py"', "depth = 0", "base.py:1: depth = 0: expected int >= 1"),
        ('base = "base.py"', 'base = "third.py"', "small.py"),
        (
            'depth = 2\nbase = "base.py"',
            "depth = 4",
            'small.py:2: base = "base.py": expected a file\'s name, in the first',
        ),
        ("base = 4", "", "small.py:1: base = 4: expected a file's name"),
        ('base = "none.py"', "", "none.py' (No such file or directory); it is the base of"),
        ('base = "small.py"', "", "one level deep; this one is the base of"),
    ],
)
def test_mistakes_in_a_base_are_told_in_one_line(script, tmp_path, small, base, message):
    (tmp_path / "small.py").write_text(small)
    (tmp_path / "base.py").write_text(base)
    assert message in refusal(script, str(tmp_path / "small.py"))


def test_a_program_takes_the_settings_of_the_script_it_runs(script, tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "scripts").mkdir()
    script.rename(tmp_path / "scripts" / "stage.py")
    tool = tmp_path / "dev" / "tool.py"
    tool.write_text("""ALSO = "scripts/stage.py"\nrepeats: Positive = 3  # times\nsettings = configure(__name__)\n""")
    given = parse_args(read_block(tool), ["--repeats=2", "--depth=4"])
    assert {name: value for name, (value, _) in given.items()} == {"repeats": 2, "depth": 4}
    assert list(read_block(tool).settings)[-1] == "repeats"
    tool.write_text("from nanochat.configurator import Positive, configure\n" + tool.read_text() + "print(settings)\n")
    result = run(tool, "--rows=3", "--depth=4")
    assert result.returncode == 0 and "'depth': 4" in result.stdout and "'matrix_lr': 0.02" in result.stdout
    tool.write_text(tool.read_text().replace("repeats", "depth"))
    with pytest.raises(UserError, match="declared twice"):
        read_block(tool)


def test_a_settings_file_with_a_byte_order_mark_is_read(script, tmp_path):
    (tmp_path / "my.py").write_text("\ufeffdepth = 3\n", encoding="utf-8")
    assert values(script, str(tmp_path / "my.py")) == {"depth": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth = 4\ndept = 3\n", ":2). Did you mean depth? --help lists them all."),
        ("depth = 4\ndepth = = 3\n", ":2: invalid syntax; expected name = value"),
        ("depth = 'x'\n", ":1: depth = 'x': expected int >= 1"),
        ("depth = 0\n", ":1: depth = 0: expected int >= 1"),
        ("depth = True\n", ":1: depth = True: expected int"),
        ("matrix_lr = 1e999\n", "expected 0 <= float"),
        (f"matrix_lr = 1{'0' * 400}\n", "expected 0 <= float"),
        ("\nsource = 'sft'\n", ":2: source = 'sft': expected one of base, mid"),
        ("quiet = 1\n", ":1: quiet = 1: expected bool"),
        ("model_tag = ['d4']\n", "expected str or None"),
        ("depth = 1 // 0\n", ":1: `depth = 1 // 0`: expected name = literal value; nothing is executed"),
        ("depth = 1 / 0\n", ":1: `depth = 1 / 0`: expected name = literal value; nothing is executed"),
        ("depth = {[]: 1}\n", ":1: `depth = {[]: 1}`: expected name = literal value"),
        ("import os\n", ":1: `import os`: expected name = literal value; nothing is executed"),
        ("if True:\n    depth = 1\n", ":1: `if True:`: expected name = literal value; nothing is executed"),
        ("depth: int\n", ":1: `depth: int`: expected name = literal value; nothing is executed"),
        ("depth = __import__('os').system('touch ran')\n", "expected name = literal value; nothing is executed"),
        ("depth, quiet = 4, True\n", "expected name = literal value; nothing is executed"),
        ("\0", ": source code string cannot contain null bytes"),
        pytest.param(f"depth = 1{' + 1' * 5000}\n", "my.py:", id="5,000 terms"),
        pytest.param(f"depth = 1{' + 1' * 990}\n", ":1: `depth = 1 + 1 + 1 + ", id="990 terms"),
        pytest.param(f"depth = {'lambda: ' * 3000}1\n", "my.py:", id="no recursion but memory"),
        pytest.param(f"depth = 0x{'f' * 9000}\n", ":1: `depth = 0xfff", id="an int that cannot be printed"),
    ],
)
def test_mistakes_in_a_settings_file_name_their_line(script, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(text, encoding="utf-8")
    found = refusal(script, "my.py")
    assert "my.py" in found and message in found and len(found) < 250 and "\n" not in found
    assert not Path("ran").exists()


def test_bare_words_can_be_a_setting(script, tmp_path):
    """python -m nanochat.report reset"""
    script.write_text(SCRIPT.replace('"i": "source"', '"": "source"'), encoding="utf-8")
    (tmp_path / "my.py").write_text("depth = 3\n")
    assert values(script, "base", str(tmp_path / "my.py")) == {"source": "base", "depth": 3}
    assert refusal(script, "bas") == "bas: expected one of base, mid"
    assert "SOURCE, --source" in help_text(read_block(script))
    script.write_text(SCRIPT.replace('"i": "source"', '"": "prompt"'), encoding="utf-8")
    assert values(script, "a b") == {"prompt": "a b"} and values(script, "a", "b c") == {"prompt": "a 'b c'"}


def test_binary_as_settings_file(script, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    assert "not a settings file" in refusal(script, str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("depth = 20\n", ":2: setting depth has no comment"),
        ("depth = 20  #\n", ":2: setting depth has no comment"),
        ("tag = None  # name\n", ":2: setting tag needs a literal default and one of the types"),
        ("tag: int  # no default\n", ":2: setting tag needs a literal default"),
        ("tag = [1]  # a list\n", ":2: setting tag needs a literal default and one of the types"),
        ("tag: list[int] = [1]  # a list\n", ":2: setting tag needs a literal default and one of the types"),
        ("tag: int | str = 1  # two types\n", ":2: setting tag needs a literal default and one of the types"),
        ("tag = 1  # no range\n", ":2: setting tag needs a literal default and one of the types Positive, "),
        ("tag: int = 1  # no range\n", ":2: setting tag needs a literal default and one of the types"),
        ("tag: Share | Positive = 1  # two ranges\n", ":2: setting tag needs a literal default and one of the types"),
        ("tag: Positive = 0  # wrong default\n", ":2: setting tag = 0: expected int >= 1"),
        ("tag: Literal['a', 1] = 1  # two types\n", ":2: setting tag needs a literal default and one of the types"),
        ("tag = open('x')  # a call\n", ":2: setting tag needs a literal default"),
        ("tag: Literal['a'] = 'b'  # wrong default\n", ":2: setting tag = 'b': expected one of a"),
        ("a = True  # x\na = True  # x\n", ":3: setting a is declared twice"),
        ("SHORT = {'a': 'c'}\na = True  # x\n", ": SHORT maps letters (not h) to settings of the block"),
        ("SHORT = {'h': 'a'}\na = True  # x\n", ": SHORT maps letters (not h) to settings of the block"),
    ],
)
def test_badly_written_block(tmp_path, block, message):
    path = tmp_path / "stage.py"
    path.write_text(f"from nanochat.configurator import configure\n{block}settings = configure(__name__)\n")
    with pytest.raises(UserError) as error:
        read_block(path)
    assert f"{path}{message}" in str(error.value)


def test_badly_written_block_is_one_line_for_whoever_runs_it(tmp_path):
    path = tmp_path / "stage.py"
    path.write_text("from nanochat.configurator import configure\ndepth = 20\nsettings = configure(__name__)\n")
    result = run(path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_help_says_everything_the_block_says(script):
    text = help_text(read_block(script))
    assert text.startswith("A stage.\n")
    for part in [
        "\nModel\n",
        "\nHorizon: at most one of these three\n",
        "--model-tag",
        "-p, --prompt",
        "base, mid",
        "'mid'",
    ]:
        assert part in text
    for setting in read_block(script).settings.values():
        assert setting.help in text and setting.type_name in text and repr(setting.default) in text


def test_run_assigns_returns_and_reports(script, tmp_path):
    (tmp_path / "my.py").write_text("source = 'base'\n")
    result = run(script, "--depth=4", str(tmp_path / "my.py"), "-p", "x=y")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "depth = 4 (from --depth, default 20)",
        f"source = 'base' (from {tmp_path / 'my.py'}:1, default 'mid')",
        "prompt = 'x=y' (from -p, default '')",
        "True",  # the returned dict is what the module variables hold
        "depth=4 source='base' prompt='x=y'",
    ]


def test_a_mistake_is_one_line_and_exit_2_and_only_rank_0_speaks(script):
    result = run(script, "--dept=4")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "stage: no setting named dept (--dept=4). Did you mean depth? --help lists them all.\n"
    result = run(script, "--dept=4", rank="1")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "")
    assert run(script, "--depth=4", rank="1").stdout.splitlines() == ["True", "depth=4 source='mid' prompt=''"]


def test_help_exits_0_also_beside_mistakes(script):
    for argv in (["--help"], ["-h"], ["--zzz", "--help"]):
        result = run(script, *argv)
        assert (result.returncode, result.stderr) == (0, "") and "number of layers" in result.stdout
    assert run(script, "--help", rank="1").stdout == ""


def test_imported_script_keeps_its_defaults(script, monkeypatch, capsys):
    """Tests import scripts: pytest's own arguments must not reach them."""
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", ["pytest", "--zzz", "--help"])
    stage = __import__("stage")
    monkeypatch.delitem(sys.modules, "stage")
    assert stage.settings["depth"] == stage.depth == 20
    assert list(stage.settings) == list(read_block(script).settings)
    assert capsys.readouterr() == ("", "")


def test_former_names_point_at_settings_that_exist():
    blocks = [read_block(path) for path in (ROOT / "scripts").glob("*.py")]
    known = {name for block in blocks for name in block.settings}
    assert set(FORMER_NAMES.values()) <= known
    for block in blocks:  # max_new_tokens is what chat_eval has and what chat_cli once had: never both in one script
        assert not {name for name, now in FORMER_NAMES.items() if {name, now} <= block.settings.keys()}
