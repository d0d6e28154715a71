"""The report reads records and nothing else; what has not run shows as "-"."""

from nanochat.report import newest, render, sparkline

START = {"tag": "d4", "settings": {}, "argv": ["/x/scripts/base_train.py", "--depth=4"], "git": "abc", "python": "3.12"}
START |= {
    "event": "start",
    "time": 0.0,
    "platform": "Linux",
    "cpu": "a CPU",
    "cpu_count": 2,
    "versions": {"torch": "2.13"},
}


def run(stage, *events, time=0.0, tag="d4"):
    start = {**START, "stage": stage, "tag": tag, "time": time}
    return [start, *({"time": time + 1 + i, **event} for i, event in enumerate(events))]


def step(number, loss):
    return {"event": "step", "step": number, "smooth_loss": loss}


def test_stages_that_have_not_run_show_as_dashes():
    text = render([run("base", {"event": "plan", "first_step": 0, "num_steps": 7})])
    assert "| steps | 7 |" in text and "| tokens per second | - |" in text and "- train: - documents" in text
    assert "`scripts.base_train --depth=4`" in text


def test_a_resumed_run_is_one_run():
    first = run("base", {"event": "plan", "first_step": 0}, step(0, 5.0), step(1, 4.0), step(2, 3.0))
    second = run("base", {"event": "plan", "first_step": 2}, step(2, 3.5), step(3, 2.5), time=100.0)
    other = run("base", {"event": "plan", "first_step": 0}, step(0, 9.0), tag="d6")
    events = newest([other, first, second], "base")
    assert [(e["step"], e["smooth_loss"]) for e in events if e["event"] == "step"] == [
        (0, 5.0),
        (1, 4.0),
        (2, 3.5),
        (3, 2.5),
    ]


def test_a_fresh_run_forgets_the_earlier_one():
    first = run("base", {"event": "plan", "first_step": 0}, step(0, 5.0))
    second = run("base", {"event": "plan", "first_step": 0}, step(0, 6.0))
    assert [e["smooth_loss"] for e in newest([first, second], "base") if e["event"] == "step"] == [6.0]


def test_the_corpus_shown_is_the_one_trained_on():
    totals = [{"train": {"documents": n, "text_bytes": n}, "validation": {}} for n in (11, 22)]
    runs = [
        run("dataset", {"event": "corpus", "totals": t}, tag=tag)
        for tag, t in zip(("docs", "web"), totals, strict=True)
    ]
    text = render([*runs, run("base", {"event": "corpus", "name": "docs"})])
    assert "- train: 11 documents" in text


def test_sparkline_goes_from_the_lowest_to_the_highest():
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0] * 500) == "▁" * 72
    line = sparkline([float(i) for i in range(500)])
    assert len(line) == 72 and line[0] == "▁" and line[-1] == "█"
