"""Nothing is lost: runs that are killed, stopped, lied to, damaged and starved of disk, in every stage.

Each test has a quick tier here and a long one in dev/soak.sh with the numbers of docs/reference/durability.md.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from nanochat import checkpoint_manager as manager
from nanochat.common import UserError
from tests import tiny
from tests.faults import FAULTS, FOLDERS, Faults

STEPS, SAVE_EVERY = 8, 2
QUICK, LONG = 2, 20


def tiers(quick: int, long: int) -> list[Any]:
    """A number of trials for the suite, and one for dev/soak.sh."""
    return [pytest.param(quick, id="quick"), pytest.param(long, id="long", marks=pytest.mark.soak)]


@pytest.fixture(scope="module")
def home(faults):
    """Corpus, tokenizer, a base model of 256 tokens' context called `t`, and conversations."""
    faults.prepare_chats(num_iterations=4)
    return faults.base_dir


@pytest.fixture(autouse=True)
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))


class Lab:
    """A stage's runs under tags of their own."""

    counted: dict[str, dict[str, int]] = {}  # points of the runs that nothing happens to, by tag

    def __init__(self, home: Path, faults: Faults, stage: str, **settings: Any):
        self.home, self.faults, self.stage = home, faults, stage
        self.settings = {"num_iterations": STEPS, "save_every": SAVE_EVERY, **settings}
        if stage in ("mid", "sft"):
            self.settings |= {"mixture": str(home / "chats.jsonl")}

    def start(self, tag: str, ranks: int = 1, **changes: Any) -> list[int]:
        fault = {key: changes.pop(key) for key in list(changes) if key in {*FAULTS, "rank"}}
        resume = {"resume": bool(self.steps(tag))} if "resume_from_step" not in changes else {}
        return self.faults.start(self.stage, {**self.settings, "model_tag": tag, **resume, **changes}, ranks, **fault)

    def run(self, tag: str, ranks: int = 1, **changes: Any) -> tuple[int, str]:
        """Start or resume; the first rank's exit code, and the output."""
        self.start(tag, ranks, **changes)
        codes, output = self.faults.finish()
        return codes[0], output

    def folder(self, tag: str) -> Path:
        return self.home / FOLDERS[self.stage] / tag

    def steps(self, tag: str) -> list[int]:
        return manager.saved_steps(self.folder(tag))

    def weights(self, tag: str, step: int) -> bytes:
        return (self.folder(tag) / f"step_{step:06d}" / "model.safetensors").read_bytes()

    def trained(self, tag: str) -> int:
        """Steps that the records know of."""
        return max((event["step"] + 1 for event in tiny.events(self.home, self.stage, tag, "step")), default=0)

    def losses(self, tag: str) -> dict[int, float]:
        """Of each step as it was trained last."""
        return {event["step"]: event["loss"] for event in tiny.events(self.home, self.stage, tag, "step")}

    def whole(self, ranks: int = 1) -> bytes:
        """The last weights of a run that nothing happens to."""
        tag = f"{self.stage}-whole{ranks}"
        if not self.steps(tag):
            self.counted[tag] = self.points(tag, ranks)
        return self.weights(tag, STEPS)

    def copy_steps(self, tag: str, *steps: int) -> None:
        """A run that came as far as the last of the steps."""
        self.whole()
        for step in steps:
            name = f"step_{step:06d}"
            shutil.copytree(self.folder(f"{self.stage}-whole1") / name, self.folder(tag) / name)

    def points(self, tag: str, ranks: int = 1) -> dict[str, int]:
        """How many points a run has by place; a run to its end."""
        code, output = self.run(tag, ranks, count=True)
        assert code == 0, output
        counts: dict[str, int] = json.loads(re.search(r"points: (.*)", output)[1])
        return counts

    def check_newest(self, tag: str) -> None:
        """Every checkpoint that counts is whole, and at most save_every steps are lost."""
        steps = self.steps(tag)
        for step in steps:
            manager.open_checkpoint(manager.step_dir(self.folder(tag), step)).verify()
        assert (steps[-1] if steps else 0) >= self.trained(tag) - SAVE_EVERY

    def finish(self, tag: str, ranks: int = 1) -> None:
        """Resume to the end, which is that of the run that nothing happens to."""
        self.start(tag, ranks)
        codes, output = self.faults.finish()
        assert codes == [0] * ranks, output
        self.check_finished(tag, ranks)

    def check_finished(self, tag: str, ranks: int = 1) -> None:
        assert self.weights(tag, STEPS) == self.whole(ranks)
        assert [path.name for path in self.folder(tag).iterdir() if not re.fullmatch(r"step_\d{6}", path.name)] == []
        assert list(self.home.rglob(".*.tmp")) == []


@pytest.mark.parametrize("trials", tiers(QUICK, LONG))
@pytest.mark.parametrize("place", ["loop", "save"])
@pytest.mark.parametrize("stage", ["base", "mid", "sft", "rl"])
def test_kill_9_anywhere_loses_at_most_save_every_steps(home, faults, stage, place, trials):
    """Killed, resumed, killed again, at random lines of the loop or of saving: a whole newest checkpoint each time, and
    in the end the bits of the run that nobody killed.
    """
    lab, rng = Lab(home, faults, stage), random.Random(f"{stage}{place}")
    lab.whole()
    points, kills, tag = lab.counted[f"{stage}-whole1"][place], 0, ""
    while kills < trials:
        tag = f"{stage}-killed-{place}-{trials}-{kills}"
        code = -signal.SIGKILL
        while kills < trials and code:  # a run that gets to its end begins anew
            code, output = lab.run(tag, kill_at=(place, rng.randint(1, points)))
            assert code in (0, -signal.SIGKILL), output
            kills += code != 0
            lab.check_newest(tag)
        if code:
            lab.finish(tag)
        else:
            lab.check_finished(tag)


# -----------------------------------------------------------------------------


def damage(path: Path, how: str, rng: random.Random) -> None:
    """One bit flipped, the end cut off, or a page zeroed."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if how == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    else:
        page = slice(at // 4096 * 4096, at // 4096 * 4096 + 4096)
        if not any(data[page]):
            return damage(path, "flip", rng)
        data[page] = bytes(len(data[page]))
    path.write_bytes(data)


@pytest.mark.parametrize("trials", tiers(6, 200))
def test_damage_in_any_file_is_found_and_never_trained_on(home, faults, trials):
    """In a file of the newest checkpoint: the one before is used, and the run ends as if nothing had been. In corpus or
    tokenizer: the run ends with the file's name, before a step.
    """
    lab, rng = Lab(home, faults, "base"), random.Random(trials)
    corpus = home / "data" / "tiny"
    kinds = ["model.safetensors", "optim.safetensors", "tokenizer.json", "meta.json", "shard", "manifest", "tokenizer"]
    found = 0
    for trial in range(trials):
        kind, how, tag = kinds[trial % len(kinds)], rng.choice(["flip", "cut", "zero"]), f"damaged{trials}-{trial}"
        lab.copy_steps(tag, 4, 6)
        victim = {
            "shard": corpus / "shard_00000.parquet",
            "manifest": corpus / "manifest.json",
            "tokenizer": home / "tokenizer" / "tokenizer.json",
        }.get(kind, lab.folder(tag) / "step_000006" / kind)
        whole = victim.read_bytes()
        damage(victim, how, rng)
        code, output = lab.run(tag)
        victim_is_ours = kind not in kinds[:4]
        if victim_is_ours:
            victim.write_bytes(whole)
            found += code == 2 and str(victim) in output and lab.trained(tag) == 0
        else:
            found += code == 0 and "resumed from" in output and "step_000004" in output
            assert lab.weights(tag, STEPS) == lab.whole()
        assert found == trial + 1, (kind, how, code, output)
        shutil.rmtree(lab.folder(tag))


@pytest.mark.parametrize("trials", tiers(2, 10))
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_what_is_needed(home, faults, trials):
    lab, rng = Lab(home, faults, "base"), random.Random(trials)
    for trial in range(trials):
        tag = f"full{trials}-{trial}"
        lab.copy_steps(tag, 2, 4)
        code, output = lab.run(tag, limit_file_size=rng.randint(64_000, 550_000))  # the files have 557 and 720 KB
        assert code == 2 and re.search(
            r"step 000006 could not be saved \(.*\): a checkpoint needs [\d,]+ bytes", output
        )
        assert "Traceback" not in output and lab.steps(tag) == [2, 4]
        lab.check_newest(tag)
        lab.finish(tag)


@pytest.mark.soak
def test_a_small_file_system_says_what_is_needed(home, faults):
    """tmpfs with room for one checkpoint and the start of a second, and with room for two when only one is kept."""
    lab = Lab(home, faults, "base")
    size = sum(file.stat().st_size for file in (lab.folder("t") / "step_000004").iterdir())
    for tag, keep_last, room in (("smallfs1", -1, 1.9 * size), ("smallfs2", 1, 2.1 * size)):
        lab.folder(tag).mkdir(parents=True)
        options = ["-o", f"size={int(room)}"]
        mount = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", lab.folder(tag)], capture_output=True)
        if mount.returncode:
            pytest.skip(f"mounting is not allowed here: {mount.stderr.decode().strip()}")
        try:
            code, output = lab.run(tag, keep_last=keep_last)
            if keep_last == -1:
                assert code == 2 and "No space left" in output and "free; make room" in output
                assert lab.steps(tag) == [2]
            else:
                assert code == 0 and lab.steps(tag) == [STEPS], output
            lab.check_newest(tag)
        finally:
            subprocess.run(["umount", lab.folder(tag)], check=True)


@pytest.mark.parametrize("trials", tiers(3, 20))
def test_sigterm_to_one_of_two_ranks_stops_both_and_resumes_bit_for_bit(home, faults, trials):
    """At lines of the loop and of saving, spread over the run, among them those of evaluations and samples; to one rank
    only.
    """
    lab, rng = Lab(home, faults, "base", eval_every=3, sample_every=5), random.Random(trials)
    points = lab.points(f"counted{trials}")
    stopped = 0
    for trial in range(trials):
        tag, place = f"sigterm{trials}-{trial}", rng.choice(["loop", "loop", "save"])
        rank = 0 if place == "save" else rng.randrange(2)
        first = 60 if place == "loop" else 1
        point = first + int((points[place] - first) * (trial + rng.random()) / trials)
        signum = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        lab.start(tag, 2, signal_at=(place, point, int(signum)), rank=rank)
        codes, output = faults.finish()
        lab.check_newest(tag)
        assert lab.trained(tag) == (lab.steps(tag) or [0])[-1]  # saved where it stopped, nothing lost at all
        if lab.trained(tag) < STEPS:  # else it came in the final evaluation, after the last save
            assert codes == [128 + signum] * 2, (point, output)
            stopped += 1
            lab.finish(tag, ranks=2)
        else:
            lab.check_finished(tag, ranks=2)
    assert stopped >= trials * 0.6


@pytest.mark.soak
def test_sigterm_at_any_moment_of_the_clock(home, faults):
    """Not at a line but at a time after the ranks have met, also before the loop: then there is nothing to save, and
    nothing is lost either.
    """
    lab, rng = Lab(home, faults, "base", eval_every=3, sample_every=5), random.Random(5)
    started = time.monotonic()
    lab.run("clock", 2)
    seconds = time.monotonic() - started
    for trial in range(20):
        tag = f"clock{trial}"
        pids = lab.start(tag, 2)
        while "device:" not in (home / "faults.log").read_text():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.7 * seconds))
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(rng.choice(pids), signal.SIGTERM)
        codes, output = faults.finish()
        lab.check_newest(tag)
        if 0 < lab.trained(tag) < STEPS:
            assert codes == [143, 143], output
        elif lab.trained(tag) == 0:  # it came before the loop: the other rank says who died
            assert sorted(codes) in ([-15, 2], [143, 143]), output
        lab.finish(tag, ranks=2)


@pytest.mark.parametrize("kind", ["loss", "gradient", "parameter"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_number_that_is_not_finite_stops_before_the_update(home, faults, kind, ranks):
    """In the fifth step, on one rank. What was good is saved; a model with a NaN in it is not."""
    lab, tag = Lab(home, faults, "base"), f"nan{kind}{ranks}"
    lab.start(tag, ranks, spoil=(kind, 6), rank=ranks - 1)
    codes, output = faults.finish()
    assert codes == [3] * ranks, output
    lab.whole(ranks)
    assert lab.steps(tag) == ([2, 4] if kind == "parameter" and ranks == 1 else [2, 4, 5])
    assert lab.weights(tag, 4) == lab.weights(f"base-whole{ranks}", 4)
    bundles = sorted((home / "failed" / f"base-{tag}-step_000005").iterdir())
    assert [path.name for path in bundles] == [f"rank{rank}.json" for rank in range(ranks)]
    suspects = [name for path in bundles for name in json.loads(path.read_text())["not_finite"]]
    assert suspects or kind == "loss"
    code, output = lab.run(tag, ranks)
    assert code == 0, output
    assert lab.weights(tag, STEPS) == lab.whole(ranks)


@pytest.mark.parametrize(
    "stage", ["base", *(pytest.param(stage, marks=pytest.mark.soak) for stage in ("mid", "sft", "rl"))]
)
def test_three_ranks_continue_on_one_and_on_two(home, faults, stage):
    """Same batches, losses within 1e-5 in fp32 over 20 steps."""
    rows = {"base": {"total_batch_size": 12 * 32}, "rl": {}}.get(stage, {"total_batch_size": 12 * 256})
    lab = Lab(home, faults, stage, num_iterations=20, save_every=10, **rows)
    tag = f"three-{stage}"
    code, output = lab.run(tag, 3)
    assert code == 0, output
    expected = lab.losses(tag)
    for ranks in (1, 2):
        code, output = lab.run(tag, ranks, resume_from_step=10, save_every=-1)
        assert code == 0, output
        losses = lab.losses(tag)
        assert [losses[step] for step in range(20)] == pytest.approx([expected[step] for step in range(20)], abs=1e-5)
        (lab.folder(tag) / "step_000020").rename(lab.folder(tag) / f"gone{ranks}")


def test_a_failing_record_is_a_full_disk_and_not_a_traceback(home, faults):
    """The first thing that a full disk refuses is the line that every step writes."""
    lab = Lab(home, faults, "base")
    code, output = lab.run("record", limit_file_size=2_000)
    assert code == 2 and "cannot write to" in output and "Traceback" not in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gpu_that_is_too_small_is_one_line_and_nothing_half_updated_is_saved(home, faults, ranks):
    lab, tag = Lab(home, faults, "base"), f"small{ranks}"
    lab.start(tag, ranks, run_out_of_memory=6, rank=ranks - 1)
    codes, output = faults.finish()
    assert codes == [2, 2][-ranks:] and "Traceback" not in output, output
    assert output.count("CUDA out of memory. Tried to allocate 2.00 GiB. Fewer rows (--device-batch-size)") == 1
    assert lab.steps(tag) == [2, 4]


def test_damaged_checkpoints_are_refused_where_nothing_is_to_be_resumed(home):
    lab_folder = home / "base_checkpoints" / "hurt"
    shutil.copytree(home / "base_checkpoints" / "t", lab_folder)
    damage(lab_folder / "step_000004" / "model.safetensors", "flip", random.Random(0))
    with pytest.raises(UserError, match="use another step: there is none"):
        manager.load_model("base", manager.torch.device("cpu"), model_tag="hurt")
