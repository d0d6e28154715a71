"""Runs side by side: the multiplier is the ratio it says, bounds are called bounds, and what differs is listed."""

import math
import re
from pathlib import Path

import pytest

from dev import compare_runs
from dev.compare_runs import compare, needed
from nanochat.common import UserError
from nanochat.report_page import HUES, to_html
from tests.test_report import HOSTILE, Page, plan, run, step, write


def trained(tag, bpbs, *, time=0.0, every=10, cost=1, first=0, ends=True, settings=None, **start):
    """A run with quick validations of these values, one after each `every` steps of 100 tokens of cost * 1000 FLOPs."""
    events = [{"event": "corpus", "name": "docs", "fingerprint": "a" * 64}]
    events.append(plan(first, flops_per_token=1000 * cost, num_steps=every * len(bpbs), parameters=10**6))
    for number, bpb in enumerate(bpbs):
        for at in range(first + number * every, first + (number + 1) * every):
            events.append(step(at, bpb, seconds=2.0))
        events.append({"event": "eval", "step": first + (number + 1) * every, "val_bpb_quick": bpb})
    if ends:
        events.append({"event": "eval", "step": first + every * len(bpbs), "val_bpb": bpbs[-1] - 0.1})
        events.append({"event": "end", "tokens_per_second": 50, "flops_per_second": 5e4, "peak_memory_bytes": 1e9})
    given = {"depth": 4, "matrix_lr": 0.02, "eval_tokens": 99, "model_tag": tag, **(settings or {})}
    return run("base", *events, tag=tag, time=time, settings=given, **start)


def of(base_dir: Path, *runs, names=None, dollars=None):
    for number, events in enumerate(runs):
        write(base_dir, f"base-{events[0]['tag']}-{number}.jsonl", events)
    tags = list(dict.fromkeys(events[0]["tag"] for events in runs))
    return compare(tags if names is None else names, base_dir / "records", dollars)


def cells(text: str, name: str) -> list[str]:
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return row.removesuffix(" |").split(" | ")[1:]


def test_the_baseline_needs_as_much_as_its_curve_says():
    curve = [(10.0, 3.0), (1000.0, 2.0), (4000.0, 2.0), (8000.0, 1.0)]
    assert needed(curve, 2.5) == ("", pytest.approx(100.0))  # halfway in bpb is halfway in log FLOPs
    assert needed(curve, 3.0) == ("", 10.0) and needed(curve, 2.0) == ("", pytest.approx(1000.0))
    assert needed(curve, 1.5) == ("", pytest.approx(math.sqrt(4000 * 8000)))
    assert needed(curve, 3.5) == ("less than ", 10.0)
    assert needed(curve, 0.5) == ("more than ", 8000.0)
    assert needed([(10.0, 2.0), (20.0, 3.0), (40.0, 1.0)], 2.0) == ("", 10.0)  # the first time counts


def test_the_compute_multiplier_is_the_baselines_flops_over_the_others(base_dir):
    # Baseline: 3.0, 2.5, 2.0 bpb at 1, 2 and 4 times 1e6 FLOPs; the other is at 2.25 after 1.5e6, at 3.0 before.
    baseline = trained("a", [3.0, 2.5, 2.25, 2.0])
    text = of(base_dir, baseline, trained("b", [3.0, 2.25], cost=0.75))[0]
    assert cells(text, r"compute multiplier \*") == ["1", "2"]  # 3e6 / 1.5e6
    assert cells(text, r"training time multiplier \*") == ["1", "1.5"]  # 60 s / 40 s
    assert cells(text, "FLOPs") == ["4 M", "1.5 M"]
    # and at the baseline's last bpb: the other never gets to 2.0, so what it needs is more than what it spent
    assert cells(text, "compute multiplier at the baseline's bpb") == ["1", "less than 2.67"]


def test_a_baseline_that_never_gets_there_is_a_bound(base_dir):
    text = of(base_dir, trained("a", [3.0, 2.5]), trained("b", [2.75, 2.0]))[0]
    assert cells(text, r"compute multiplier \*") == ["1", "more than 1"]
    at_its_own = cells(text, "compute multiplier at the baseline's bpb")[1]
    assert float(at_its_own) == pytest.approx(2 / 2 ** (1 / 3), rel=1e-2)  # 2.5 is a third of the way in log FLOPs
    text = of(base_dir, trained("a", [2.0, 1.5]), trained("b", [3.0, 2.5]))[0]
    assert cells(text, r"compute multiplier \*") == ["1", "less than 0.5"]


def test_runs_with_a_price_have_a_cost(base_dir):
    runs = trained("a", [3.0], device="NVIDIA H100", ranks=8), trained("b", [2.0])
    begin, *_, end = runs[0]
    end["time"] = begin["time"] + 1800
    assert cells(of(base_dir, *runs)[0], "cost") == ["$12.00", "-"]
    assert cells(of(base_dir, *runs, dollars=1.0)[0], "cost")[0] == "$4.00"


def test_runs_without_quick_validations_have_no_multiplier(base_dir):
    bare = [event for event in trained("b", [2.0]) if "val_bpb_quick" not in event]
    text = of(base_dir, trained("a", [3.0]), bare)[0]
    assert "| compute multiplier \\* | 1 | - |" in text
    assert "without a multiplier: b (--eval-every)" in text


def test_only_what_differs_is_listed(base_dir):
    other = trained("b", [2.0], settings={"matrix_lr": 0.04, "new": True}, git="def")
    text = of(base_dir, trained("a", [3.0]), other)[0]
    rows = "| matrix_lr | `0.02` | `0.04` |\n| commit | `abc` | `def` |\n| new | `-` | `True` |\n"
    table = f"|  | a | b |\n| --- | --- | --- |\n{rows}"
    assert f"## Settings that differ\n\n{table}\n7 others are the same in all.\n" in text


def test_other_text_makes_bits_per_byte_incomparable(base_dir):
    other = trained("b", [2.0])
    other[1]["fingerprint"] = "b" * 64
    assert "validated on different corpora" in of(base_dir, trained("a", [3.0]), other)[0]
    less = trained("b", [2.0], settings={"eval_tokens": 1})
    assert "different amounts of validation text" in of(base_dir, trained("a", [3.0]), less)[0]
    assert "not of the same text" not in of(base_dir, trained("a", [3.0]), trained("b", [2.0]))[0]


def test_a_resumed_run_is_compared_as_one(base_dir):
    stop = {"event": "stopped", "time": 60.0, "step": 20, "reason": "a signal"}
    begun = [*trained("b", [3.0, 2.5], ends=False), stop]
    resumed = trained("b", [2.25], first=10, time=100.0)  # from the checkpoint before the last ten steps
    text, _ = of(base_dir, trained("a", [3.0, 2.0]), begun, resumed)
    assert "\nruns a · b; the baseline is a\n" in text
    assert cells(text, "steps") == ["20", "20"]
    assert cells(text, "training time") == ["40 s", "40 s"]  # steps that were done again count once
    assert "after step 20: a signal" in text and "resumed at step 10" in text
    (base_dir / "records" / "base-b-1.jsonl").unlink()
    with pytest.raises(UserError, match=r"^b begins at step 10: .*records/before-<time>/: move them back$"):
        compare(["a", "b"], base_dir / "records")


def test_records_of_the_same_tag_are_told_apart_by_their_files(base_dir):
    old, new = trained("a", [3.0]), trained("a", [2.0], time=100.0)
    names = [str(base_dir / "records" / "base-a-0.jsonl"), "base-a-1.jsonl"]  # as a path, and as a name among them
    text = of(base_dir, old, new, names=names)[0]
    assert text.splitlines()[2] == "runs base-a-0 · base-a-1; the baseline is base-a-0"


def test_runs_lie_over_each_other_and_every_line_is_its_own(base_dir):
    text, drawn = of(base_dir, trained("a", [3.0, 2.5]), trained("b", [2.0]))
    assert [curve.x for curve in drawn] == ["tokens", "tokens", "log₁₀ of FLOPs", "seconds"]
    by_flops = {series.name: series.points for series in drawn[2].series if series.look == "line"}
    assert by_flops == {"a": [(6.0, 3.0), (math.log10(2e6), 2.5)], "b": [(6.0, 2.0)]}
    html = to_html(text, drawn)
    assert 'class="line hue1"' in html and ">2,000</text>" in html
    assert "\na: 3 → 2.5\n█▁\nb: 2\n▁\n" in text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "0 given to compare: expected 2 to 6 tags"),
        (["a"], "1 given to compare"),
        (["a"] * (HUES + 1), "7 given to compare"),
        (["a", "x"], "no base run of tag x in .*records; there are: a$"),
        (["a", "x.jsonl"], "no record x.jsonl; expected tags of base runs"),
        (["a", "sft.jsonl"], "is a record of sft; expected one of base training"),
        (["a", "none.jsonl"], "none has no step in its record"),
    ],
)
def test_names_of_no_runs_are_one_line(base_dir, names, said):
    write(base_dir, "sft.jsonl", run("sft", plan()))
    write(base_dir, "none.jsonl", run("base", plan(), tag="a", time=-9.0))
    with pytest.raises(UserError, match=said) as caught:
        of(base_dir, trained("a", [3.0]), names=names)
    assert "\n" not in str(caught.value)


def test_hostile_tags_and_settings_are_shown_and_not_interpreted(base_dir):
    hostile = trained(HOSTILE, [2.0], settings={"note": HOSTILE, HOSTILE: 1}, git=HOSTILE)
    hostile[1]["name"] = HOSTILE
    write(base_dir, "b.jsonl", hostile)
    text, drawn = of(base_dir, trained("a", [3.0]), names=["a", HOSTILE])
    tags = {name for name, _ in Page(to_html(text, drawn)).tags}
    assert not tags & {"script", "img", "a", "link", "iframe"}
    assert "\x1b" not in text and not re.search(r"^# not", text, re.MULTILINE)


def test_the_command_writes_both_faces(base_dir, capsys, monkeypatch):
    write(base_dir, "a.jsonl", trained("a", [3.0]))
    write(base_dir, "b.jsonl", trained("b c", [2.0]))
    monkeypatch.setattr(compare_runs, "runs", "a 'b c'")
    compare_runs.main()
    assert (base_dir / "report" / "compare.md").read_text(encoding="utf-8") in capsys.readouterr().out
    assert (base_dir / "report" / "compare.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    monkeypatch.setattr(compare_runs, "runs", "a 'b")
    with pytest.raises(UserError, match="No closing quotation"):
        compare_runs.main()
