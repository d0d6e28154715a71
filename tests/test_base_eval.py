"""The command: what it prints and records, stopped and continued, on several ranks, and what it refuses."""

import json
import math

import pytest
import torch

from nanochat.common import UserError
from nanochat.compute import Compute
from scripts import base_eval
from tests import tiny
from tests.faults import FOLDERS
from tests.test_conversation import BYTES
from tests.test_core_eval import CPU, model_of, write_bundle

NAMES = ("choose", "fill", "say")
MODEL = "base-t-000002"


@pytest.fixture(scope="module")
def home(faults):
    """A tiny checkpoint, and tasks of 16, 2 and 16 items."""
    code, output = faults.run("base", {"num_iterations": 2, "model_tag": "t"})
    assert code == 0, output
    path = write_bundle(faults.base_dir / "bundle") / "eval_data" / "words" / "fill.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    return faults.base_dir


@pytest.fixture
def score(home, monkeypatch, capsys):
    """Run main() with some settings, in this process; gives what it prints."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    monkeypatch.setattr(base_eval, "compute_init", lambda *_: Compute(torch.device("cpu"), torch.float32))

    def run(**settings):
        with monkeypatch.context() as patch:
            for name, value in {"bundle": str(home / "bundle"), **settings}.items():
                patch.setattr(base_eval, name, value)
            base_eval.main()
        return capsys.readouterr().out

    return run


def newest(home, kind, count=1):
    return tiny.events(home, "base_eval", MODEL, kind)[-count:]


def answers(home):
    """{task: {line: what the model chose}} of the answers that are kept."""
    contents = {name: json.loads((home / "core" / MODEL / f"{name}.json").read_text()) for name in NAMES}
    return {name: {a["line"]: (a["right"], a["prediction"]) for a in contents[name]["answers"]} for name in NAMES}


def test_where_answers_cannot_be_kept_the_score_is_said_all_the_same(home, score, monkeypatch, tmp_path):
    for name in FOLDERS.values():
        if (home / name).exists():
            (tmp_path / name).symlink_to(home / name)
    for name in ("core", "records"):  # files, where there should be folders
        (tmp_path / name).touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    output = score(max_per_task=4)
    assert "records: File exists; this evaluation goes on without a record" in output
    assert output.count("are not kept") == 3 and "\nCORE: " in output and "the answer to every item" not in output


def test_every_task_is_recorded_and_a_second_run_scores_only_what_is_missing(home, score):
    output = score(rescore=True)
    assert output.splitlines()[-2].startswith("CORE: ") and "of 16, centred" in output
    core, events = newest(home, "core")[0], newest(home, "core_task", 3)
    assert [event["task"] for event in events] == core["tasks"] == [*NAMES]
    assert core["value"] == pytest.approx(sum(event["centered"] for event in events) / 3)
    assert core["missing"] == [] and core["partial"] is False
    errors = [event["stderr"] / (1 - base) for event, base in zip(events, (0.5, 0.5, 0.0), strict=True)]
    assert core["stderr"] == pytest.approx(math.hypot(*errors) / 3)
    assert [event["n"] for event in events] == [16, 2, 16] and events[0]["cut"] == 16

    before = answers(home)
    (home / "core" / MODEL / "fill.json").unlink()  # as a run leaves it that is stopped at its second task
    output = score()
    assert output.count("scored before") == 2 and "fill: scored before" not in output
    assert answers(home) == before and newest(home, "core")[0]["value"] == core["value"]
    assert len(newest(home, "core_task", 100)) == 6
    assert "scored before" not in score(max_per_task=5), "another question"
    assert "(at most 5 items of each task)" in score(max_per_task=5)


def test_three_ranks_give_the_answers_of_one(home, faults, score):
    """16 items do not divide evenly, and of 2 one rank gets none. What an earlier run has scored, only rank 0 knows."""
    score(tasks="choose", rescore=True)
    for name in ("fill", "say"):
        (home / "core" / MODEL / f"{name}.json").unlink(missing_ok=True)
    code, output = faults.run("base_eval", {"bundle": str(home / "bundle")}, ranks=3)
    assert code == 0, output
    assert output.count("scored before") == 1 and output.count("CORE: ") == 1
    together = answers(home)
    score(rescore=True)
    assert answers(home) == together


def test_a_mean_over_some_tasks_is_not_called_core(home, score):
    output = score(tasks="say|choose")
    assert "partial, not CORE: " in output and "over 2 of 3 tasks" in output and "without fill" in output
    path = home / "bundle" / "eval_data" / "words" / "fill.jsonl"
    aside = path.rename(path.with_suffix(".aside"))
    try:
        output = score()
        assert "partial, not CORE: " in output and "fill: not scored, there is no " in output
        core = newest(home, "core")[0]
        assert core["missing"] == ["fill"] and core["partial"] is True
        with pytest.raises(UserError, match="none of these tasks is there"):
            score(tasks="fill")
    finally:
        aside.rename(path)


def test_a_model_is_compiled_only_for_many_items(home, monkeypatch):
    """16 items of 125 tasks are 2,000."""
    task, *_ = base_eval.load_tasks(home / "bundle")
    monkeypatch.setattr(base_eval, "can_compile", lambda device: True)
    cpu = Compute(torch.device("cpu"), torch.float32)
    assert base_eval.worth_compiling([task] * 125, cpu) and not base_eval.worth_compiling([task] * 124, cpu)
    monkeypatch.setattr(base_eval, "max_per_task", 15)
    assert not base_eval.worth_compiling([task] * 125, cpu)
    monkeypatch.setattr(base_eval, "max_per_task", -1)
    monkeypatch.setattr(base_eval, "can_compile", lambda device: False)
    assert not base_eval.worth_compiling([task] * 125, cpu)


def test_scores_are_kept_sealed_and_used_for_the_same_question_only(tmp_path, capsys):
    task, *_ = base_eval.load_tasks(write_bundle(tmp_path))
    score = base_eval.score_task(task, base_eval.GPTScorer(model_of(), BYTES, CPU), CPU, 5)
    key, path = base_eval.score_key(task, {"model": "a"}), tmp_path / "choose.json"
    base_eval.save_score(path, key, score)
    assert base_eval.load_score(path, key) == score and len(path.read_text().splitlines()) == 5 + 4
    assert base_eval.load_score(path, base_eval.score_key(task, {"model": "b"})) is None
    path.write_text(path.read_text().replace("true", "false", 1))
    assert base_eval.load_score(path, key) is None and "scored again" in capsys.readouterr().out


def test_mistakes_are_one_line(score):
    with pytest.raises(UserError, match=r"--tasks=chose: expected all, or some of choose\|fill\|say"):
        score(tasks="choose|chose")
    with pytest.raises(UserError, match="no config.json there"):
        score(hf_path="/nowhere")
