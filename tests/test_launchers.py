"""The launchers, run with fakes of everything they call: what they start, skip, refuse, and how they end."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dev.gpu_page import make
from nanochat.common import STAGES, get_base_dir
from nanochat.configurator import parse_args, read_block
from nanochat.schedule import BatchPlan
from nanochat.sizing import choose_batch
from tests import tiny
from tests.test_core_eval import write_bundle
from tests.test_docs import problems

ROOT = Path(__file__).parent.parent
SERIES = {"dev/miniseries.sh": 6, "dev/scaling_laws.sh": 24}  # and the models that they train
PIPELINES = ["speedrun.sh", "run1000.sh", "launch_6x_amd_xtx.sh"]
LAUNCHERS = [*PIPELINES, *SERIES, "dev/runcpu.sh"]
SCRIPTS = [*ROOT.glob("*.sh"), *ROOT.glob("dev/*.sh"), *ROOT.glob("dev/slurm/*")]
STEPS = (
    "dataset dataset dataset tok_train tok_eval base_train base_loss base_eval gen_words gen_identity "
    "mid_train chat_eval chat_sft chat_eval chat_rl chat_eval chat_cli report"
).split()

# Stands for every program: writes down how it was called, fails where FAIL occurs in that, does what others need; where
# REAL occurs, the real one runs.
FAKE = r"""#!/bin/bash
name="$(basename "$0")"
REAL="${REAL:-nothing}"
[[ "$*" != *"$REAL"* ]] || { cd "$ROOT" && exec "$PYTHON" "$@"; }
[[ "$*" != *dev.check_settings* ]] || exit 0
{ printf '%q ' "$name" "$@"; echo; } >>"$CALLS"
[[ -z "${FAIL:-}" || "$name $*" != *"$FAIL"* ]] || exit "${CODE:-1}"
for word; do
  case "$word" in --model-tag=*) tag="${word#*=}" ;; esac
done
case "$name $*" in
  srun*)
    while [[ "$1" == --* ]]; do shift; done
    code=0
    for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
      SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" || code=$?
    done
    exit "$code" ;;
  "scontrol show hostnames"*) printf 'node07\nnode08\n' ;;
  "python -c import torch"*) echo "${TORCH:-2.13.0 7.2 6 24}" ;;
  rocm-smi*)
    for ((card = 0; card < ${ROCM_SMI:-0}; card++)); do printf 'GPU[%d]\t\t: Card Series: \t\t7900\n' $card; done ;;
  *--prefetch=list*) [ -z "${MISSING:-}" ] || { echo "missing $MISSING"; exit 2; } ;;
  *scripts.bench* | *dev.bench_* | *dev.peer_pace*) printf 'a table\n{"tokens_per_second": 1234567, "mfu": 0.4123}\n' ;;
  *scripts.tok_train*) mkdir -p "$NANOCHAT_BASE_DIR/tokenizer" && touch "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ;;
  *scripts.base_train* | *scripts.mid_train* | *scripts.chat_sft* | *scripts.chat_rl*)
    env >"$CALLS.env"
    [[ "$name" != python || -z "${RANK:-}" ]] ||
      echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT" >>"$CALLS.ranks"
    case "$*" in *base_train*) stage=base ;; *mid_train*) stage=mid ;; *sft*) stage=chatsft ;; *) stage=chatrl ;; esac
    step="$NANOCHAT_BASE_DIR/${stage}_checkpoints/$tag/step_1"
    mkdir -p "$step" && touch "$step/meta.json"
    echo "step 1/2: 3.2 min left" ;;
esac
"""
FAKED = "python torchrun srun scontrol sbatch rocm-smi".split()


class Checkout:
    """A copy of the launchers in a temporary directory, with an environment of fakes and a base directory."""

    def __init__(self, folder: Path) -> None:
        self.path, self.base, self.calls_file = folder / "checkout", folder / "base", folder / "calls"
        for script in SCRIPTS:
            copy = self.path / script.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(script, copy)
        self.bin = self.path / ".venv" / "bin"
        self.bin.mkdir(parents=True)
        for name in FAKED:
            program(self.bin / name, FAKE)
        (self.bin / "activate").write_text(f'export VIRTUAL_ENV="{self.bin.parent}"\nexport PATH="{self.bin}:$PATH"\n')
        (self.path / "dev" / "setup.sh").write_text('echo "setup $TORCH_BUILD" >>"$CALLS"\n')

    def run(self, script: str, *words: str, **settings: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(**self.start(script, *words, **settings), capture_output=True, timeout=60)

    def start(self, script: str, *words: str, **settings: object) -> dict[str, Any]:
        """What subprocess is to start a launcher with. ROOT and PYTHON are for what is not faked."""
        outer = {"PATH": "/usr/bin:/bin", "HOME": self.path, "CALLS": self.calls_file, "NANOCHAT_BASE_DIR": self.base}
        outer |= {"ROOT": ROOT, "PYTHON": sys.executable, **settings}
        environment = {name: str(value) for name, value in outer.items()}
        return {"args": ["bash", str(self.path / script), *words], "cwd": self.path, "env": environment, "text": True}

    def calls(self, word: str = "") -> list[list[str]]:
        """The commands so far in which a word occurs."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [shlex.split(line) for line in lines if word in line]

    def modules(self) -> list[str]:
        """What ran, in order: the module of each python and torchrun, `dataset`, `base_train`, ..."""
        return [call[call.index("-m") + 1].split(".")[-1] for call in self.calls() if "-m" in call]

    def environment(self) -> dict[str, str]:
        """What the last training stage saw."""
        lines = Path(f"{self.calls_file}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def job(self, **settings: object) -> subprocess.CompletedProcess[str]:
        """job.slurm as Slurm runs it: from a copy elsewhere, with Slurm's variables."""
        spool = self.path.parent / "spool" / "slurm_script"
        spool.parent.mkdir(exist_ok=True)
        shutil.copy(self.path / "dev/slurm/job.slurm", spool)
        slurm = {"SLURM_SUBMIT_DIR": self.path, "SLURM_JOB_ID": 4711, "SLURM_JOB_NODELIST": "node[07-08]"}
        slurm |= {"SLURM_NTASKS": 2, "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_CPUS_PER_TASK": 8}
        path = f"{self.bin}:/usr/bin:/bin"  # srun and scontrol are there before the environment is entered
        return self.run(str(spool), **{"PATH": path, **slurm, **settings})


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def speedrun(checkout: Checkout) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda **settings: checkout.run("speedrun.sh", **settings)


def flag(call: list[str], name: str) -> str:
    """The value of a flag as the script will see it: the last one given."""
    return [word.partition("=")[2] for word in call if word.startswith(f"--{name}=")][-1]


def refused(result: subprocess.CompletedProcess[str], said: str) -> None:
    """Exit code 2 and one line."""
    assert result.returncode == 2
    assert said in result.stderr and result.stderr.count("\n") == 1


# -----------------------------------------------------------------------------
# Every command takes the values that it is given

# The other values that speedrun.sh names for its variables.
VALUES = {"DEVICE_BATCH_SIZE": "auto", "CORPUS": "fineweb-edu", "HORIZON": "--num-iterations=100"}
VALUES |= {"MEMORY_ARGS": "--shard --recompute", "DOLLARS_PER_HOUR": "2.5"}


def shown() -> list[tuple[str, dict[str, str]]]:
    """(launcher, variables) of every call with variables before it that a document or a launcher shows."""
    line = re.compile(
        r"(?:^(?:# +)?|`)((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) +)+)(?:bash|sbatch) (\S+\.(?:sh|slurm))", re.MULTILINE
    )
    found = []
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *SCRIPTS]:
        for variables, launcher in line.findall(path.read_text()):
            words = dict(word.split("=", 1) for word in shlex.split(variables))
            words.pop("STAGES", None)  # all of them: the values are what matters here
            if launcher in (*LAUNCHERS, "dev/slurm/job.slurm") and words not in ({}, {"DRY_RUN": "1"}):
                found.append((launcher, words))
    return found


def test_values_are_found_where_they_are_shown():
    """Guards the test below: it would pass if the search found nothing."""
    assert ("speedrun.sh", {"NPROC": "4", "DEVICE_BATCH_SIZE": "auto"}) in shown()
    assert {"launch_6x_amd_xtx.sh", "dev/slurm/job.slurm", "dev/miniseries.sh"} <= {launcher for launcher, _ in shown()}


@pytest.mark.parametrize(("launcher", "variables"), [*((name, VALUES) for name in LAUNCHERS), *shown()])
def test_no_value_that_we_show_trains_for_hours_and_then_ends_in_the_next_script(
    checkout, launcher, variables, monkeypatch
):
    """DEVICE_BATCH_SIZE=auto was right for base_train and wrong for base_loss."""
    run = checkout.job if "slurm" in launcher else partial(checkout.run, launcher)
    for _ in range(2 if variables is VALUES else 1):  # the second time all that train are given --resume
        assert run(**variables).returncode == 0
        variables = {**variables, "EVAL_ARGS": "--seed=1", "BASE_ARGS": "--seed=1"}
    assert "base_train" in parse_calls(checkout, monkeypatch)


def parse_calls(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that were called, after each has parsed its settings as it would before it begins."""
    monkeypatch.chdir(ROOT)  # settings files are given relative to it
    for call in checkout.calls("-m "):
        module, words = call[call.index("-m") + 1], call[call.index("-m") + 2 :]
        if module == "pytest":
            continue
        parse_args(read_block(ROOT / f"{module.replace('.', '/')}.py"), words)
    return checkout.modules()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"RL_ARGS": "--num-sample=2"}, "scripts.chat_rl: no setting named num_sample (--num-sample=2). Did you mean"),
        (
            {"DEVICE_BATCH_SIZE": "most", "DRY_RUN": "1"},
            "base_train: --device-batch-size=most: expected int >= 1 or auto",
        ),
        (
            {"DOLLARS_PER_HOUR": "$2", "STAGES": "report"},
            "report: --dollars-per-hour=$2: expected 0 <= float < 1e9 or None",
        ),
    ],
)
def test_a_wrong_value_of_the_last_stage_is_refused_before_the_first(checkout, settings, said):
    refused(checkout.run("speedrun.sh", REAL="check_settings", **settings), said)
    assert not checkout.modules()


# -----------------------------------------------------------------------------
# Stages


def test_speedrun_runs_every_stage_in_order(checkout, speedrun):
    """Also with WANDB_RUN=dummy, which turns logging off and nothing else."""
    result = speedrun(WANDB_RUN="dummy")
    assert result.returncode == 0, result.stderr
    assert checkout.modules() == STEPS
    assert (
        "== base_train: torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20" in result.stdout
    )
    # A launcher in use sourced the environment in a pipeline, whose subshell kept it to itself.
    assert checkout.environment()["VIRTUAL_ENV"] == str(checkout.path / ".venv")


def test_dry_run_shows_what_would_run_and_runs_nothing(checkout, speedrun):
    result = speedrun(DRY_RUN=1)
    assert result.returncode == 0
    assert re.findall(r"would run .*-m \w+\.(\w+)", result.stdout) == STEPS
    assert not checkout.calls()


def test_finished_stages_are_skipped_until_one_has_other_settings(checkout, speedrun):
    speedrun(STAGES="tok base mid")
    ran = len(checkout.modules())
    result = speedrun(STAGES="tok base mid", NPROC=3, WANDB_RUN="other")  # neither changes a result
    assert len(checkout.modules()) == ran
    assert "== base_train: finished earlier" in result.stdout
    speedrun(STAGES="tok base mid", BASE_ARGS="--matrix-lr=0.03")
    assert checkout.modules()[ran:] == ["base_train", "gen_words", "gen_identity", "mid_train"]
    assert "--resume" in checkout.calls("base_train")[-1]
    assert (checkout.base / "logs/base_train.log").read_text().count("min left") == 2  # the log goes on


def test_first_failure_stops_with_its_exit_code_and_the_log_names_it(checkout, speedrun):
    result = speedrun(FAIL="scripts.tok_eval", CODE=7)
    assert result.returncode == 7
    assert checkout.modules()[-1] == "tok_eval"
    assert "tok_eval ended with exit code 7" in result.stderr
    log = (checkout.base / "logs/run.log").read_text().splitlines()
    at = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.fullmatch(rf"{at}tok_train: took \d:\d\d:\d\d, \d:\d\d:\d\d in all", log[-3])
    assert re.fullmatch(rf"{at}tok_eval: ended with exit code 7 after \d+ s", log[-1])
    assert speedrun().returncode == 0  # goes on there
    assert checkout.modules().count("tok_train") == 1


def test_switches_choose_stages(checkout, speedrun):
    speedrun(STAGES="tok")
    assert checkout.modules() == ["dataset", "tok_train", "tok_eval"]
    speedrun(STAGES="base,eval")
    assert checkout.modules()[3:] == "dataset dataset base_train base_loss base_eval gen_words gen_identity".split()


def test_speedrun_takes_newer_rules_from_a_settings_file(checkout, speedrun, monkeypatch):
    """They win over the launcher's, and are nanochat's arithmetic for this depth."""
    assert speedrun(STAGES="tok base", VOCAB_SIZE=32768, BASE_ARGS="dev/configs/speedrun_2026.py").returncode == 0
    parse_calls(checkout, monkeypatch)
    call = checkout.calls("scripts.base_train")[0]
    found = parse_args(read_block(ROOT / "scripts/base_train.py"), call[call.index("-m") + 2 :])
    given = {name: value for name, (value, _) in found.items()}
    assert (given["depth"], given["target_param_data_ratio"], given["ratio_counts"]) == (20, 12, "matmuls")
    matmuls = {depth: 12 * depth * (64 * depth) ** 2 + 32768 * 64 * depth for depth in (12, 20)}
    tokens, first = (12 * matmuls[depth] for depth in (20, 12))
    batch = 2 ** round(math.log2(2**19 * (tokens / first) ** 0.383))
    scale = math.sqrt(batch / 2**19)
    assert given["total_batch_size"] == batch
    assert given["weight_decay"] == pytest.approx(0.28 * scale * first / tokens, rel=1e-3)
    assert [given[f"{name}_lr"] / scale for name in ("matrix", "embedding", "unembedding")] == pytest.approx(
        [0.02, 0.3, 0.008], rel=1e-3
    )
    assert given["warmup_ratio"] * tokens / batch == pytest.approx(40, abs=0.5)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_stage_enabled_is_an_error(checkout, launcher):
    for stages in ("", " ", ","):
        said = "there is nothing to run; name some of: tok base mid sft rl eval report\n"
        result = checkout.run(launcher, STAGES=stages)
        refused(result, said)
        assert result.stdout == ""
    assert not checkout.calls()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_argument_does_not_start_what_it_was_not_meant_for(checkout, launcher):
    """--help installed and trained, --depth=12 trained a d20."""
    result = checkout.run(launcher, "--help")
    assert (result.returncode, result.stderr) == (0, "") and f"bash {launcher}" in result.stdout
    assert ("DEPTH=20 " in result.stdout) == (launcher == "speedrun.sh") and "!/usr" not in result.stdout
    refused(
        checkout.run(launcher, "--depth=12"), f"{Path(launcher).name}: --depth=12 is not taken; settings are variables"
    )
    refused(checkout.run(launcher, ""), " is not taken; settings are variables")
    assert not checkout.calls() and not checkout.base.exists()


@pytest.mark.parametrize("script", ["soak.sh", "test.sh", "check.sh"])
def test_help_of_a_script_for_developers_installs_and_tests_nothing(tmp_path, script):
    copy = tmp_path / "dev" / script  # alone: it finds nothing to install and nothing to test
    copy.parent.mkdir()
    copy.write_text((ROOT / "dev" / script).read_text())
    result = subprocess.run(["bash", copy, "--help"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and "bash dev/" in result.stdout


@pytest.mark.parametrize("folder", ["~/x y", "~root-less/x", "~"])
def test_a_quoted_tilde_is_the_same_place_for_bash_and_python(checkout, monkeypatch, folder):
    monkeypatch.setenv("HOME", str(checkout.path / "home"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", folder)
    monkeypatch.chdir(checkout.path)
    settings = {"STAGES": "tok", "HOME": checkout.path / "home", "NANOCHAT_BASE_DIR": folder}
    assert checkout.run("speedrun.sh", **settings).returncode == 0
    assert (get_base_dir() / "logs" / "tok_train.done").exists()


def test_unknown_stages_and_missing_checkpoints_are_named(checkout, speedrun):
    refused(speedrun(STAGES="base,midd"), 'STAGES="base midd": there is no midd, only: tok base')
    missing = f"a checkpoint in {checkout.base}/base_checkpoints/d20, which mid starts from; add base"
    refused(speedrun(STAGES="mid,sft"), missing)
    assert not checkout.calls()


def test_checkpoints_lie_where_the_library_puts_them(checkout):
    names = f'TAG=d20; source {ROOT}/dev/stages.sh; for stage in {" ".join(STAGES)}; do checkpoints "$stage"; done'
    environment = {"PATH": "/usr/bin:/bin", "NANOCHAT_BASE_DIR": str(checkout.base)}
    said = subprocess.run(["bash", "-c", names], env=environment, capture_output=True, text=True).stdout
    assert said.split() == [f"{checkout.base}/{folder}/d20" for folder, *_ in STAGES.values()]


def test_a_signal_to_all_waits_for_the_stage_to_save_and_ends_with_its_code(checkout):
    saving = "trap 'sleep 0.3; echo saved; exit 143' TERM\necho training\nwhile :; do sleep 0.05; done\n"
    program(checkout.bin / "torchrun", f"#!/bin/bash\n{saving}")
    process = subprocess.Popen(**checkout.start("speedrun.sh"), stdout=subprocess.PIPE, start_new_session=True)
    log = checkout.base / "logs/base_train.log"
    tiny.wait_until(lambda: log.exists() and "\ntraining" in log.read_text())
    os.killpg(process.pid, 15)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert log.read_text().endswith("saved\n")
    assert not (checkout.base / "logs/base_train.done").exists()


# -----------------------------------------------------------------------------
# What is different in each


@pytest.mark.parametrize("launcher", [*PIPELINES, "dev/miniseries.sh"])
def test_wandb_run_is_respected(checkout, launcher):
    """A launcher in use set it to empty."""
    checkout.run(launcher, WANDB_RUN="mine", STAGES="base" if "mini" in launcher else "tok base")
    assert flag(checkout.calls("base_train")[0], "run") == "mine"


def test_the_laptop_run_has_one_budget_and_not_minutes_here_and_steps_there(checkout):
    """It promised 15 minutes and took 25 on slower cores: the base model was cut short, the chat stages were not."""
    result = checkout.run("dev/runcpu.sh", MINUTES=25)
    assert result.returncode == 0, result.stderr
    minutes = [
        flag(checkout.calls(stage)[0], "minutes") for stage in ("base_train", "mid_train", "chat_sft", "chat_rl")
    ]
    assert sum(map(float, minutes)) == pytest.approx(25 - 4)
    assert (
        "plan for MINUTES=25: train base for {}, mid for {}, SFT for {}, RL for {}; 4".format(*minutes) in result.stdout
    )
    for wrong in ("4", "ten", "7.5", "99999999999999999999"):
        refused(checkout.run("dev/runcpu.sh", MINUTES=wrong), f"MINUTES={wrong}: expected a whole number, 5 to 999999")


def test_run1000_is_d32_with_eight_rows_and_800_shards(checkout):
    assert checkout.run("run1000.sh").returncode == 0
    call = checkout.calls("base_train")[0]
    assert [flag(call, name) for name in ("depth", "device-batch-size", "model-tag")] == ["32", "8", "d32"]
    assert checkout.calls("-n 800")


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({}, 6),
        ({"TORCH": "2.13.0 7.2 5 16"}, 5),
        ({"TORCH": "2.13.0 7.2 1 24"}, 1),
        ({"NPROC": 3}, 3),
        ({"TORCH": "2.13.0 7.2 0 0", "ROCM_SMI": 5}, 5),  # cards that torch does not see
        ({"TORCH": "2.13.0 7.2 0 0", "NPROC": 4}, 4),
        ({"TORCH": "2.13.0 7.2 0 0"}, 6),
    ],
)
def test_amd_cards_are_ranks_and_take_the_rows_that_fit(checkout, settings, ranks):
    assert checkout.run("launch_6x_amd_xtx.sh", STAGES="tok base", **settings).returncode == 0
    call = checkout.calls("base_train")[0]
    assert f"--nproc_per_node={ranks}" in call
    assert (flag(call, "device-batch-size"), flag(call, "total-batch-size")) == ("auto", "368640")


def test_six_cards_take_five_micro_batches_and_others_come_near():
    """With the rows that fit of a d20 in 24 GB."""
    assert choose_batch(368640, 6, 2048, 6) == BatchPlan(6, 2048, 6, grad_accum_steps=5)
    assert choose_batch(368640, 7, 2048, 7).tokens == 358400


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"TORCH": "2.13.0+cu130 none 6 24"}, "TORCH_BUILD=rocm7.2 bash dev/setup.sh"),
        ({"TORCH": "2.13.0 7.2 4 24", "NPROC": "6"}, "NPROC=6, but there are 4 cards"),
        ({"PYTORCH_HIP_ALLOC_CONF": "expandable_segments:True"}, "unset it"),
    ],
)
def test_amd_launcher_refuses_what_cannot_work(checkout, settings, said):
    refused(checkout.run("launch_6x_amd_xtx.sh", **settings), said)
    assert not checkout.modules()


def test_a_model_of_which_no_row_fits_ends_before_the_first_stage(checkout):
    """scripts.plan says so, and what to do."""
    assert checkout.run("launch_6x_amd_xtx.sh", DEPTH=32, FAIL="scripts.plan", CODE=2).returncode == 2
    assert checkout.modules() == ["plan"]
    assert {"--depth=32", "--gpus=6", "--vram-gb=24"} <= set(checkout.calls("plan")[0])


def test_a_model_that_does_not_fit_is_sharded_in_every_stage_that_can(checkout):
    settings = {"DEPTH": "32", "MEMORY_ARGS": "--shard --recompute"}
    assert checkout.run("launch_6x_amd_xtx.sh", STAGES="tok base mid sft", **settings).returncode == 0
    for stage in ("base_train", "mid_train", "chat_sft"):
        assert {"--shard", "--recompute"} <= set(checkout.calls(stage)[0])


def test_amd_environment_has_levels_that_rccl_knows_and_hides_no_card(checkout):
    """A launcher in use said NCCL_DEBUG=ON, and six visible devices whatever was there."""
    checkout.run("launch_6x_amd_xtx.sh", STAGES="tok base", NCCL_P2P_LEVEL="SYS")
    seen = checkout.environment()
    assert seen["NCCL_DEBUG"] in ("VERSION", "WARN", "INFO", "TRACE")
    assert seen["NCCL_P2P_LEVEL"] == "SYS"  # ours is a default
    assert (seen["HSA_FORCE_FINE_GRAIN_PCIE"], seen["NCCL_IB_DISABLE"]) == ("1", "1")
    assert not {"HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "PYTORCH_HIP_ALLOC_CONF"} & seen.keys()
    assert checkout.calls("setup rocm7.2")


@pytest.mark.parametrize(("launcher", "rows"), SERIES.items())
def test_grids_show_their_rows_and_skip_the_finished_ones(checkout, launcher, rows):
    assert checkout.run(launcher, DRY_RUN=1).stdout.count("scripts.base_train") == rows
    failed = checkout.run(launcher, FAIL="--depth=12", CODE=3)
    assert failed.returncode == 3
    done = len(checkout.calls("base_train")) - 1
    assert checkout.run(launcher, DRY_RUN=1).stdout.count("would run torchrun") >= rows - done
    assert checkout.run(launcher).returncode == 0
    assert len(checkout.calls("base_train")) == rows + 1  # the failed one twice
    assert len({flag(call, "model-tag") for call in checkout.calls("base_train")}) == rows


def test_series_table_has_a_row_for_each_run_and_dashes_for_what_is_not_known(base_dir, capsys, monkeypatch):
    """A table in use was cut out of logs with grep, and empty when the wording changed."""
    from dev import series_table

    (base_dir / "records").mkdir(parents=True)
    start = {"event": "start", "argv": [], "settings": {"depth": 2, "model_tag": "law-d2"}}
    plan = {"event": "plan", "first_step": 0, "num_steps": 10, "batch": "1,024 tokens = 2 micro-batches", "time": 1}
    plan |= {"parameters": 1000, "flops_per_token": 6000}
    result = [
        {"event": "eval", "step": 10, "val_bpb": 1.5, "time": 2},
        {"event": "end", "train_seconds": 3.5, "time": 3},
    ]
    core = [{**start, "stage": "base_eval", "tag": "d2-step10", "time": 4}, {"event": "core", "value": 0.2, "time": 5}]
    for name, events in {
        "base-law-d2": [{**start, "stage": "base", "tag": "law-d2", "time": 0}, plan, *result],
        "base-law-d3": [{**start, "stage": "base", "tag": "law-d3", "time": 0, "settings": {"depth": 3}}, plan],
        "base-other": [{**start, "stage": "base", "tag": "other", "time": 0}, plan],
        "base_eval": core,
    }.items():
        lines = "".join(json.dumps(event) + "\n" for event in events)
        (base_dir / "records" / f"{name}-1.jsonl").write_text(lines)
    monkeypatch.setattr(series_table, "prefix", "law-")
    series_table.main()
    rows = (base_dir / "report" / "law.csv").read_text().splitlines()[1:]
    assert rows == ["law-d2,2,1000,10240,10.24,61440000,1.5,0.2,3.5", "law-d3,3,1000,10240,10.24,61440000,,,"]
    assert capsys.readouterr().out.splitlines()[2].split()[-3:] == ["-", "-", "-"]


# -----------------------------------------------------------------------------
# Slurm


def test_slurm_makes_the_output_file_and_signals_the_ranks():
    """Slurm makes no directory, and a job without its output file does not start."""
    directives = re.findall(r"^#SBATCH (.*)", (ROOT / "dev/slurm/job.slurm").read_text(), re.MULTILINE)
    assert [line for line in directives if line.startswith("--output=")] == ["--output=%x-%j.out"]
    assert "--signal=TERM@300" in directives and "--requeue" in directives


def test_every_sbatch_line_that_we_show_ends_with_the_script():
    """One in use had a comment inside a continued command: sbatch got no script, and it ran on the login node."""
    files = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("dev/slurm/*")]
    shown = [line for file in files for line in re.findall(r"\bsbatch [^`\n]*?\S(?=  |`|$|\")", file.read_text(), re.M)]
    commands = [line for line in shown if "dev/slurm" in line or "--" in line]
    assert len(commands) >= 5
    for command in commands:
        assert command.split()[-1] == "dev/slurm/job.slurm", command


def test_job_on_an_empty_folder_names_all_that_is_missing_and_ends_at_once(checkout):
    began = time.monotonic()
    result = checkout.job(STAGES="mid,sft,eval", MISSING="task_data/gsm8k/main/train.parquet")
    assert time.monotonic() - began < 5
    assert result.returncode == 2
    assert "missing task_data/gsm8k/main/train.parquet" in result.stdout
    assert "bash dev/slurm/prefetch.sh" in result.stderr
    assert f"{checkout.base}/base_checkpoints/d20, which mid starts from" in result.stderr
    assert not checkout.calls("srun")
    shutil.rmtree(checkout.bin.parent)
    assert "bash dev/slurm/setup_hpc.sh" in checkout.job(PATH="/usr/bin:/bin").stderr


def test_the_real_list_of_an_empty_folder(base_dir):
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("no .venv in the checkout")
    environment = {"PATH": "/usr/bin:/bin", "NANOCHAT_BASE_DIR": str(base_dir), "SLURM_SUBMIT_DIR": str(ROOT)}
    command = ["bash", str(ROOT / "dev/slurm/job.slurm")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    missing = re.findall(rf"^missing +{base_dir}/(\S+)", result.stdout, re.MULTILINE)
    assert {"data/climbmix/manifest.json", "task_data/gsm8k/main/train.parquet"} <= set(missing)
    assert "eval_bundle/manifest.json" in missing


def test_job_runs_the_pipeline_offline_with_a_rank_for_each_task(checkout):
    result = checkout.job()
    assert result.returncode == 0, result.stderr
    assert checkout.modules()[-1] == "report"
    assert all("torchrun" not in call for call in checkout.calls())
    seen = checkout.environment()
    assert (seen["HF_HUB_OFFLINE"], seen["WANDB_MODE"]) == ("1", "offline")
    for name in ("HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "UV_CACHE_DIR"):
        assert Path(seen[name]).is_relative_to(checkout.base), name
    ranks = Path(f"{checkout.calls_file}.ranks").read_text().splitlines()
    assert ranks[:2] == ["0 2 0 1 node07 24711", "1 2 1 1 node07 24711"]
    assert {call[0] for call in checkout.calls("scripts.base_train")} == {"srun", "python"}


def test_a_failing_stage_ends_the_job_with_its_exit_code(checkout):
    """In a job in use the last command was a cp, whose status was the job's."""
    result = checkout.job(FAIL="scripts.mid_train", CODE=3)
    assert result.returncode == 3
    assert not checkout.calls("chat_sft") and not checkout.calls("requeue")


def test_a_job_stopped_by_sigterm_is_queued_again_and_goes_on(checkout):
    result = checkout.job(FAIL="scripts.mid_train", CODE=143)
    assert result.returncode == 143
    assert checkout.calls()[-1] == ["scontrol", "requeue", "4711"]
    assert checkout.job(SLURM_RESTART_COUNT=1).returncode == 0
    srun = "srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task=8 bash dev/slurm/rank.sh"
    assert len(checkout.calls(f"{srun} -m scripts.base_train")) == 1


def test_a_job_keeps_the_code_that_it_began_with(checkout):
    checkout.job(FAIL="scripts.tok_eval", CODE=143)
    (checkout.path / "speedrun.sh").write_text("exit 99\n")
    assert checkout.job(SLURM_RESTART_COUNT=1).returncode == 0
    assert not (checkout.base / "jobs/4711/source/.venv").exists()
    assert checkout.job(SLURM_JOB_ID=4712).returncode == 99


def test_job_runs_another_pipeline(checkout):
    assert checkout.job(PIPELINE="run1000.sh", DEPTH=32, SHARDS=800).returncode == 0
    assert flag(checkout.calls("base_train")[0], "depth") == "32"
    assert checkout.calls("--prefetch=list --source=climbmix -n 800")


@pytest.mark.parametrize("script", ["setup_hpc.sh", "prefetch.sh", "job.slurm"])
def test_slurm_scripts_want_a_base_directory_outside_the_checkout(checkout, script):
    for place in ("", checkout.path / "out"):
        settings = {"NANOCHAT_BASE_DIR": place, "SLURM_SUBMIT_DIR": checkout.path}
        refused(checkout.run(f"dev/slurm/{script}", **settings), "NANOCHAT_BASE_DIR")
    result = checkout.run(f"dev/slurm/{script}", "--help", NANOCHAT_BASE_DIR="")
    assert (result.returncode, result.stderr) == (0, "") and script in result.stdout


def test_setup_hpc_loads_modules_and_writes_below_one_root(checkout):
    before = set(checkout.path.rglob("*"))
    refused(checkout.run("dev/slurm/setup_hpc.sh", MODULES="cuda"), "unset MODULES")  # no module command here
    program(checkout.path.parent / "module.sh", 'module() { echo "module $*" >>"$CALLS"; }')
    modules = {"MODULES": "python/3.12 cuda", "BASH_ENV": checkout.path.parent / "module.sh"}
    result = checkout.run("dev/slurm/setup_hpc.sh", **modules)
    assert result.returncode == 0, result.stderr
    assert checkout.calls() == [["module", "load", "python/3.12", "cuda"], ["setup", "cu126"]]
    assert set(checkout.path.rglob("*")) == before
    assert (checkout.base / "cache").is_dir()


def test_prefetch_fetches_and_ends_with_the_check_of_the_job(checkout, monkeypatch):
    assert checkout.run("dev/slurm/prefetch.sh", PREFETCH_TOKENIZER=1).returncode == 0
    assert [call[3] for call in checkout.calls("--prefetch")] == ["--prefetch=all", "--prefetch=list"]
    assert "tok_train" in parse_calls(checkout, monkeypatch)
    assert checkout.run("dev/slurm/prefetch.sh", MISSING="x").returncode == 2


# -----------------------------------------------------------------------------
# The first hour on a card

PARTS = "doctor tests attention-d12 attention-d20 training-d12 training-d20 profile-d12 profile-d20".split()
PARTS += "decoding-d12 decoding-d20".split()
BESIDE = "text tokenizer beside-ours-d12 beside-ours-d20 beside-nanochat-d12 beside-nanochat-d20".split()


@pytest.fixture
def gpu_day(checkout: Checkout) -> Callable[..., subprocess.CompletedProcess[str]]:
    """On a machine with a card, whose page is really made."""
    program(checkout.bin / "nvidia-smi", "#!/bin/sh")
    (checkout.path / "docs/reference").mkdir(parents=True)
    (checkout.path / "peer/scripts").mkdir(parents=True)
    (checkout.path / "peer/scripts/base_train.py").touch()
    path = f"{checkout.bin}:/usr/bin:/bin"
    return lambda *words, **settings: checkout.run(
        "dev/gpu_day.sh", *words, **{"PATH": path, "REAL": "dev.gpu_page", **settings}
    )


def test_a_dry_run_for_a_card_lists_the_parts_on_any_machine(checkout):
    for words, settings in (((), {"DRY_RUN": 1}), (("--dry-run", str(ROOT)), {})):
        result = checkout.run("dev/gpu_day.sh", *words, **settings)
        assert result.returncode == 0, result.stderr
        assert re.findall(r"^== (\S+): would run python -m", result.stdout, re.M) == PARTS + (BESIDE if words else [])
    assert not checkout.calls() and not (checkout.path / "docs").exists()


def test_a_machine_without_a_card_is_told_so_in_one_line(checkout, gpu_day):
    if not shutil.which("nvidia-smi", path="/usr/bin:/bin") and not Path("/dev/kfd").exists():
        refused(gpu_day(PATH="/usr/bin:/bin"), "gpu_day.sh: no GPU here")
    refused(gpu_day(FAIL="import torch"), "torch sees no GPU; python -m scripts.doctor says why")
    refused(gpu_day("nowhere"), "/nowhere has no scripts/base_train.py")
    refused(gpu_day("peer", "more"), "more is not taken")
    assert not list(checkout.path.glob("docs/reference/*"))


def test_a_part_that_fails_stands_in_the_page_and_the_others_run(checkout, gpu_day, monkeypatch):
    result = gpu_day(
        "peer", FAIL="scripts.bench --max-seq-len=2048 --rows=8,16,32 --vocab-size=32768 --depth=12", CODE=7
    )
    assert (result.returncode, result.stderr) == (1, "")
    assert "gpu.md; failed: training-d12, which run again" in result.stdout
    page = (checkout.path / "docs/reference/gpu.md").read_text()
    assert "training-d12 failed with exit code 7:\n\n```\nit printed nothing\n```" in page
    assert re.findall(r"^## (\w+)", page, re.M) == [
        *dict.fromkeys(name.partition("-")[0].title() for name in PARTS + BESIDE)
    ]
    assert "| what | d20 |\n| --- | ---: |\n| tokens per second | 1,234,567 |\n| mfu | 0.4123 |\n" in page
    assert "| what | ours-d12 | ours-d20 | nanochat-d12 | nanochat-d20 |" in page
    assert problems(ROOT / "docs/reference/gpu.md", page) == []
    assert checkout.modules() == parse_calls(checkout, monkeypatch)
    assert {call[-1] for call in checkout.calls("-m dev.bench_")} == {"--device-type=cuda"}


def test_finished_parts_are_not_run_again_and_failed_ones_are(checkout, gpu_day):
    gpu_day(FAIL="tests/test_gpu.py")
    ran = len(checkout.modules())
    result = gpu_day()
    assert result.returncode == 0 and checkout.modules()[ran:] == ["pytest"]
    assert result.stdout.count("finished earlier") == len(PARTS) - 1
    gpu_day(DEPTHS="12 20 26")
    assert checkout.modules()[ran + 1 :] == "bench_attention bench bench bench_infer".split()


def test_the_page_of_a_card_has_what_the_last_lines_say(tmp_path):
    for name, end, log in (
        ("doctor", "1 python -m scripts.doctor", "ok\nMEND driver: too old\n"),
        ("training-d12", "0 python -m scripts.bench --depth=12", 'x\n{"tokens_per_second": 812345.6, "mfu": 0.51}\n'),
        ("training-d20", "0 python -m scripts.bench --depth=20", '{"mfu": null, "peak_gb": 61.5, "kernel": "a|b"}'),
        ("profile-d12", "0 python -m scripts.bench", '{"mfu": 0.5}'),
    ):
        (tmp_path / f"{name}.end").write_text(end + "\n")
        (tmp_path / f"{name}.log").write_text(log)
    spent = [("kernel", "void flash<1, 2>(int)", 1500), ("kernel", "flash<3>", 500), ("kernel", "gemm", 3000)]
    spent += [("cpu_op", "aten::mm", 9000)]
    events = [{"cat": kind, "name": name, "dur": duration} for kind, name, duration in spent]
    (tmp_path / "profile-d12.json").write_text(json.dumps({"traceEvents": [{"ph": "M"}, *events]}))
    page = make(tmp_path, ["doctor", "training-d12", "training-d20", "training-d26", "profile-d12"], "An H100")
    assert "\nAn H100. Made by" in page and "d26" not in page
    assert "doctor failed with exit code 1:\n\n```\nok\nMEND driver: too old\n```" in page
    rows = ["| what | d12 | d20 |", "| --- | ---: | ---: |", "| tokens per second | 812,346 | - |"]
    rows += ["| mfu | 0.51 | - |", "| peak gb | - | 61.5 |", "| kernel | - | a/b |", ""]
    assert "```bash\npython -m scripts.bench --depth=12\npython -m scripts.bench --depth=20\n```" in page
    assert "\n".join(rows) in page
    assert "| what | d12 |\n| --- | ---: |\n| gemm ms | 3 |\n| flash ms | 2 |\n" in page


# -----------------------------------------------------------------------------
# All of them


def test_shell_scripts_are_well_formed():
    assert len(SCRIPTS) >= 12
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)


def test_containers_run_as_a_user_without_rights_and_copy_no_environment():
    for file in ROOT.glob("docker/*.Dockerfile"):
        lines = file.read_text().splitlines()
        assert "USER 1000" in lines[lines.index("WORKDIR /nanochat") :], file
        assert not [line for line in lines if line.startswith("FROM") and ":" not in line], file  # a version each
    assert ".venv" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize(
    ("tool", "files"),
    [
        ("shellcheck -x", [script for script in SCRIPTS if script.name != "setup.sh"]),
        ("hadolint", [*ROOT.glob("docker/*.Dockerfile")]),
    ],
)
def test_linters_have_nothing_to_say(tool, files):
    if not shutil.which(tool.split()[0]):
        pytest.skip(f"{tool} is not here")
    result = subprocess.run([*tool.split(), *files], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


# -----------------------------------------------------------------------------
# The real thing, in small

SRUN = r"""#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & ranks+=($!)
  echo $! >>"$PIDS"
done
code=0
for rank in "${ranks[@]}"; do wait "$rank" || code=$?; done
exit $code
"""


def fill(base: Path) -> None:
    """All that job.slurm looks for, of the smallest size: text of two shards, a row for each split, two CORE tasks."""
    from nanochat.corpus_writer import describe_shard, save_manifest, write_shard
    from nanochat.task_data import DATA_SETS, fetch_bundle, splits_of, write_rows

    corpus = base / "data" / "climbmix"
    corpus.mkdir(parents=True)
    entries: dict[str, list[dict[str, Any]]] = {}
    for role, number, count in (("train", 0, 380), ("validation", 6542, 20)):
        words = [[tiny.WORDS[(i * k) % len(tiny.WORDS)] for k in range(1, 60)] for i in range(number, number + count)]
        write_shard(corpus / f"shard_{number:05d}.parquet", list(map(" ".join, words)))
        entries[role] = [describe_shard(corpus / f"shard_{number:05d}.parquet")]
    save_manifest(corpus, {"name": "climbmix", "source": "climbmix", "arguments": {}, "revision": "toy"}, entries)
    for data_set in DATA_SETS:
        for split in splits_of(data_set):
            write_rows(data_set, *split, [{"row": 1}], "test")
    fetch_bundle(str(write_bundle(base.parent / "bundle")))


@pytest.fixture
def cluster(base_dir: Path, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """The command that runs a job on two ranks without a network, all it needs being there, and its environment."""
    unshare = ["unshare", "-rn", "bash", "-c", 'ip link set lo up && exec "$@"', "job"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("no .venv in the checkout")
    base_dir.mkdir()
    fill(base_dir)
    scontrol = f'#!/bin/sh\necho "$*" >>{tmp_path}/scontrol.calls\necho 127.0.0.1\n'
    program(tmp_path / "srun", SRUN)
    program(tmp_path / "scontrol", scontrol)
    return [*unshare, "bash", str(ROOT / "dev/slurm/job.slurm")], {
        **{"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "NANOCHAT_BASE_DIR": str(base_dir)},
        **{"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"},
        **{"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2", "GLOO_SOCKET_IFNAME": "lo", "PIDS": f"{tmp_path}/pids"},
        **{"DEPTH": "2", "SHARDS": "1", "VOCAB_SIZE": "320", "DEVICE_BATCH_SIZE": "2", "TOTAL_BATCH_SIZE": "1024"},
        "HORIZON": "--num-iterations=4",
        "BASE_ARGS": "--aspect-ratio=32 --head-dim=16 --max-seq-len=128 --eval-tokens=2000 --no-compile",
    }


@pytest.mark.soak
def test_a_whole_job_on_two_ranks_without_a_network(base_dir, cluster):
    command, environment = cluster
    chats = f"--mixture={base_dir}/identity_conversations.jsonl --num-iterations=2 --total-batch-size=1024 --no-compile"
    environment |= {"CORE_ARGS": "--max-per-task=2", "MID_ARGS": chats, "SFT_ARGS": chats}
    environment["EVAL_ARGS"] = "-a Identity --max-problems=2 --max-new-tokens=8"
    environment["RL_ARGS"] = "--task=Arithmetic --num-iterations=1 --examples-per-step=2 --num-samples=2"
    environment["RL_ARGS"] += " --eval-examples=2"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for stage in ("base", "mid", "chatsft", "chatrl"):
        assert list((base_dir / f"{stage}_checkpoints/d2").glob("step_*/meta.json"))
    assert (base_dir / "report/report.html").exists()
    assert "device: 2 x cpu" in (base_dir / "logs/chat_rl.log").read_text()
    assert f"{base_dir}/jobs/7/source" in next(base_dir.glob("records/base-d2-*.jsonl")).read_text()
    tiny.run(base_dir, "dev.series_table", "--prefix=d")


@pytest.mark.soak
def test_a_preempted_job_saves_is_queued_again_and_finishes(base_dir, tmp_path, cluster):
    command, environment = cluster
    environment |= {"STAGES": "tok base", "HORIZON": "--num-iterations=300"}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    log = base_dir / "logs/base_train.log"
    tiny.wait_until(lambda: log.exists() and "step 15/300" in log.read_text())
    for pid in (tmp_path / "pids").read_text().split()[-2:]:  # what Slurm does: every task of the step
        os.kill(int(pid), 15)
    assert job.wait(timeout=60) == 143
    assert (tmp_path / "scontrol.calls").read_text().splitlines()[-1] == "requeue 7"
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=200).returncode == 0
    assert "resumed from" in log.read_text()
    steps = [event["step"] for event in tiny.events(base_dir, "base", "d2", "step")]
    assert steps == list(range(300))  # none lost, none done twice
