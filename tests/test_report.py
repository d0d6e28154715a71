"""The report reads records and nothing else; what has not run shows as "-"; nothing it shows is interpreted."""

import json
import re
import shlex
from html import unescape
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import report, report_page
from nanochat.common import UserError
from nanochat.report import build, command, cost, duration, grades, last, newest, read_runs
from nanochat.report_page import Curve, Series, round_ticks, rounded, sparkline, to_html
from tests.test_ui import CHROMIUM, Chromium, Tab

START = {"event": "start", "settings": {}, "git": "abc", "python": "3.12", "platform": "Linux", "cpu": "a CPU"}
START |= {"argv": ["/x/scripts/base_train.py", "--depth=4"], "cpu_count": 2, "versions": {"torch": "2.13"}}
HOSTILE = "</p><script src='https://evil.example/x.js'>|`x`\x1b[2J\x00 ![i](http://evil.example) \ud800\n# no heading"


def run(stage, *events, time=0.0, tag="d4", **start):
    first = {**START, "stage": stage, "tag": tag, "time": time, **start}
    return [first, *({"time": time + 1 + i, **event} for i, event in enumerate(events))]


def plan(first_step=0, **values):
    return {"event": "plan", "first_step": first_step, **values}


def step(number, loss, **values):
    return {"event": "step", "step": number, "smooth_loss": loss, "loss": loss + 0.1, "tokens": 100, **values}


def task(source, name, accuracy, **values):
    about = {"accuracy": accuracy, "stderr": 0.01, "n": 1000, "baseline": 0.25}
    return {"event": "task", "source": source, "task": name, **about, **values}


def chat_eval(source, *events, **values):
    return run("chat_eval", *events, tag=f"{source}-d4", **values)


def answer(source, name, prompt, text, correct):
    return {"event": "sample", "source": source, "task": name, "prompt": prompt, "answer": text, "correct": correct}


def full_set():
    end = {"event": "end", "tokens_per_second": 20000, "flops_per_second": 3e11, "mfu": None, "train_seconds": 372.0}
    end |= {"peak_memory_bytes": 1.5e9, "text": "epoch 1"}
    evals = [{"event": "eval", "step": 1, "val_bpb_quick": 2.5}, {"event": "eval", "step": 2, "val_bpb": 2.25}]
    written = {"event": "sample", "step": 2, "prompt": "The", "text": " small model"}
    chat = {"event": "sample", "step": 2, "prompt": "Who are you?", "text": "A model."}
    data, held_out = {"event": "data", "name": "SmolTalk", "conversations": 4000}, {"event": "eval", "val_loss": 2.125}
    tuned = [data, plan(num_steps=2), step(0, 3.0), step(1, 2.5), {**held_out, "step": 2}, chat, end]
    rewards = [{**step(i, 0.1), "reward": reward, "tokens": 9} for i, reward in enumerate((0.25, 0.5))]
    solved = {"event": "eval", "step": 2, "problems": 64, "pass_at": {"8": {"value": 0.625, "stderr": 0.06}}}
    solved["pass_at"]["1"] = {"value": 0.3125, "stderr": 0.03}
    graded = [task("sft", "GSM8K", 0.045, baseline=0.0), answer("sft", "GSM8K", "2 + 2?", "5", False)]
    core = {"event": "chatcore", "source": "sft", "value": 0.0884, "stderr": 0.0125, "tasks": ["ARC-Easy", "GSM8K"]}
    return [
        run("dataset", {"event": "corpus", "totals": {"train": {"documents": 11, "text_bytes": 99}}}, tag="docs"),
        run("tok_train", {"event": "end", "vocab_size": 320, "bytes_per_token": 2.0}),
        run("base", plan(num_steps=2, parameters=3342336), step(0, 8.0), step(1, 4.0), *evals, written, end, time=10.0),
        run("base_loss", {"event": "bpb", "split": "val", "bpb": 2.1}, {"event": "baselines", "xz": 3.5}, time=20.0),
        run("mid", *tuned, time=30.0),
        run("sft", *tuned, time=40.0),
        chat_eval("sft", task("sft", "ARC-Easy", 0.3125), *graded, core, {"event": "end"}, time=50.0),
        run("rl", plan(num_steps=2, task="GSM8K"), *rewards, solved, chat, end, time=60.0),
        chat_eval("rl", task("rl", "GSM8K", 0.075, baseline=0.0), {"event": "end"}, time=70.0),
        run("telemetry", {"event": "beat"}, time=80.0, settings={"depth": 4}),
    ]


def test_a_full_set_shows_every_stage():
    text = build(full_set())[0]
    assert text.startswith("# Report\n\nmodel d4 · ") and "commit abc" in text
    assert "- **val bpb**: 2.1000" in text and "- **ChatCORE after SFT**: 0.088" in text
    assert "- **GSM8K after RL**: 7.5% *4.5% after SFT*" in text and "- **parameters**: 3.34 M" in text
    assert "| ARC-Easy, % | - | - | 31.2 ± 1.0 | - | 25.0 | 1,000 |" in text
    assert "| GSM8K, % | - | - | 4.5 ± 1.0 | 7.5 ± 1.0 | 0.0 | 1,000 |" in text
    assert "| ChatCORE | - | - | 0.0884 ± 0.0125 | - | - | 2 tasks |" in text
    assert "| nats per token trained on, held-out chats | - | 2.1250 | 2.1250 | - | - | - |" in text
    rows = [line for line in text.splitlines() if "pass@" in line and line.startswith("|")]
    shares = {1: "31.2 ± 3.0", 8: "62.5 ± 6.0"}
    assert rows == [f"| GSM8K pass@{k} in training, % | - | - | - | {at} | - | 64 |" for k, at in shares.items()]
    assert "- ```prompt\n  The\n  ```\n  ```text\n   small model\n  ```\n" in text
    assert "- ```question\n  Who are you?\n  ```\n  ```answer\n  A model.\n  ```\n" in text
    assert "  2 + 2?\n  ```\n  ```answer\n  5\n  ```\n  GSM8K after SFT: wrong\n" in text
    assert "To beat, in bits per byte of the same text: xz -9 3.5000." in text
    assert "| training time | 6 min 12 s | 6 min 12 s | 6 min 12 s | 6 min 12 s |" in text
    assert "| loss at the end, smoothed | 4.0000 | 2.5000 | 2.5000 | - |" in text
    assert "- **SFT**: SmolTalk 4,000 conversations; epoch 1" in text and "- **vocabulary**: 320 tokens" in text


def test_stages_that_have_not_run_show_as_dashes():
    text = build([run("base", plan(num_steps=7))])[0]
    assert "| steps | 7 | - | - | - |" in text and "- **train**: - documents" in text and "- **val bpb**: -" in text
    assert "| tokens per second | - | - | - | - |" in text and "`python -m scripts.base_train --depth=4`" in text
    assert "not finished" in text and "## Learning" not in text and "## Samples" not in text


def test_an_unknown_stage_is_among_the_runs_and_settings_only():
    text = build([run("telemetry", {"event": "beat"}, settings={"depth": 4})])[0]
    assert "| telemetry | d4 |" in text and "#### telemetry d4\n\n```folded\ndepth=4\n```" in text
    assert text.count("telemetry") == 2 and "## Training" not in text


@pytest.mark.parametrize("ended", [[], [{"event": "end", "tokens_per_second": 1}]])
def test_a_resumed_run_is_one_run_without_the_figures_of_an_earlier_end(ended):
    evaluated = {"event": "eval", "step": 2, "val_bpb_quick": 3.0}
    first = run("base", plan(), step(0, 5.0), step(1, 4.0), evaluated, step(2, 3.0), *ended)
    second = run("base", plan(first_step=2), step(2, 3.5), step(3, 2.5), time=100.0)
    events = newest([first, run("base", plan(), step(0, 9.0), tag="d6", time=50.0), second], "base")
    steps = [(event["step"], event["smooth_loss"]) for event in events if event["event"] == "step"]
    assert steps == [(0, 5.0), (1, 4.0), (2, 3.5), (3, 2.5)]
    assert [event["step"] for event in events if event["event"] == "eval"] == [2]
    assert last(events, "end", "tokens_per_second") is None


def test_a_fresh_run_forgets_the_earlier_one():
    runs = [run("base", plan(), step(0, 5.0)), run("base", plan(), step(0, 6.0))]
    assert [event["smooth_loss"] for event in newest(runs, "base") if event["event"] == "step"] == [6.0]


def test_the_newest_grade_counts_and_others_are_named():
    runs = [
        run("chat_eval", task("sft", "MMLU", 0.9), tag="sft-d6"),
        chat_eval("sft", task("sft", "MMLU", 0.1), task("sft", "GSM8K", 0.2), time=10.0),
        run("sft", plan(), time=15.0),
        chat_eval("sft", task("sft", "MMLU", 0.3, too_long=7), time=20.0),
    ]
    accuracies = {name: events["sft"]["accuracy"] for name, events in grades(runs).items()}
    assert accuracies == {"MMLU": 0.3, "GSM8K": 0.2}
    text = build(runs)[0]
    assert "20.0 ± 1.0 †" in text and "† measured before" in text and "30.0 ± 1.0 |" in text
    assert "counted as wrong: MMLU after SFT 7." in text
    assert "not the newest or not trained here: sft-d6." in text and "90.0" not in text


def test_a_score_of_an_earlier_model_is_not_the_new_ones():
    loss = run("base_loss", {"event": "bpb", "split": "val", "bpb": 1.5})
    trained = run("base", plan(), {"event": "eval", "step": 1, "val_bpb": 1.25}, time=10.0)
    assert "- **val bpb**: 1.2500" in build([loss, trained])[0]


def test_the_corpus_shown_is_the_one_trained_on():
    totals = [{"train": {"documents": n, "text_bytes": n}, "validation": {}} for n in (11, 22)]
    made = zip(("docs", "web"), totals, strict=True)
    runs = [run("dataset", {"event": "corpus", "totals": total}, tag=tag) for tag, total in made]
    text = build([*runs, run("base", {"event": "corpus", "name": "docs"})])[0]
    assert "- **train**: 11 documents" in text


class Page(HTMLParser):
    """Tags with their attributes, the texts of the innermost elements, and whether every element is closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.texts.append("")

    def handle_data(self, data):
        if self.open:
            self.texts[-1] += data


def hostile_set():
    graded = [task("sft", HOSTILE, 0.5), answer("sft", HOSTILE, HOSTILE, HOSTILE, True)]
    written = {"event": "sample", "step": 1, "prompt": HOSTILE, "text": HOSTILE}
    start = {"settings": {"prompt": HOSTILE}, "argv": ["/x/scripts/chat_sft.py", HOSTILE], "git": HOSTILE}
    return [
        run("base", plan(formula=HOSTILE), step(0, 2.0), written, tag=HOSTILE, **start),
        run("sft", {"event": "data", "name": HOSTILE, "conversations": 1}, step(0, 2.0), written, **start),
        chat_eval("sft", *graded),
    ]


@pytest.mark.parametrize("runs", [full_set(), hostile_set()])
def test_the_page_loads_nothing_and_runs_nothing(runs):
    text = to_html(*build(runs))
    text.encode()
    page = Page(text)
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "a", "base", "form", "image", "use"}
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert not {name for name in attributes if name in ("src", "href", "xlink:href", "style") or name.startswith("on")}
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    assert ("meta", policy) in page.tags and "@media (prefers-color-scheme: dark)" in style
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert "<script" not in text


def test_hostile_text_is_shown_and_not_interpreted():
    text, curves = build(hostile_set())
    shown = report_page.visible(HOSTILE)
    assert shown.startswith("</p><script src='https://evil.example/x.js'>|`x`␛[2J␀ ![i](http://evil.example) ?\n# no")
    pieces = Page(to_html(text, curves)).texts
    assert pieces.count(shown) >= 6 and sum(" ".join(shown.split()) in piece for piece in pieces) >= 6
    assert "\x1b" not in text and "\x00" not in text
    assert report_page.visible("a\u202eb\u2066c\u2028d") == "a<U+202E>b<U+2066>c<U+2028>d"


MARKUP = st.text("ab1 _*`~|\\<>[]()#&;!-+=.:\n\t\r\0'\"{}$\u202e\u2028\x85", max_size=30)


@settings(deadline=None)
@given(MARKUP, MARKUP, MARKUP)
def test_any_text_is_shown_as_it_is(one, two, three):
    blocks = [
        report_page.facts([("x" + one, "x" + two, "x" + three)]),
        report_page.table(["", ""], [["x" + one, "x" + two]], "lc"),
        report_page.sample(one, two, verdict="x" + three),
        "A paragraph.",
        report_page.folded("x" + two, three),
    ]
    text = report_page.to_markdown("x" + one, "x" + two, [("x" + three, blocks)])
    html = to_html(text, [])
    a, b, c = (report_page.visible(text) for text in (one, two, three))
    assert [unescape(found) for found in re.findall("<pre[^>]*>(.*?)</pre>", html, re.DOTALL)] == [a, b, c]
    x, y, z = (" ".join(f"x{text}".split()) for text in (a, b, c))
    wanted = [x, y, z, x, y, z, x, y, a.strip(), b.strip(), z, "A paragraph.", y, c.strip()]
    texts = [text.strip() for text in Page(html.partition("<body>")[2].partition("</body>")[0]).texts]
    assert [text for text in texts if text] == [text for text in wanted if text]


@pytest.mark.parametrize(("count", "drawn"), [(1, 1), (7, 7), (400, 400), (5000, 400)])
def test_a_curve_has_as_many_points_as_are_drawn(count, drawn):
    line = Series("smoothed", "line", [(i, 8.0 / i) for i in range(1, count + 1)])
    svg = report_page.svg(Curve("Loss", "nats", [line, Series("validation", "mark", [(10, 2.0), (20, 1.5)])]))
    points = re.search('<polyline class="line hue0" points="([^"]*)"', svg)[1].split()
    assert len(points) == drawn and svg.count("<circle") == 2
    xs, ys = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert xs[0] >= report_page.LEFT and xs[-1] <= report_page.WIDTH and sorted(set(xs)) == list(xs)
    assert ys[0] >= 0 and ys[-1] <= report_page.HEIGHT and sorted(ys) == list(ys)  # what falls is drawn further down


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [(0.0, 1.0, "0.0 0.2 0.4 0.6 0.8 1.0"), (8.31, 2.9, "2 4 6 8 10"), (5.0, 5.0, "5 6"), (0.0, 0.0, "0.0 0.2")],
)
def test_ticks_are_round_numbers_around_the_values(low, high, labels):
    ticks, decimals = round_ticks([low, high])
    assert " ".join(f"{tick:.{decimals}f}" for tick in ticks) == labels


def test_the_report_draws_what_was_recorded():
    text, curves = build(full_set())
    titles = ["Base: loss", "Base: validation", "Mid: loss", "SFT: loss", "RL: reward"]
    assert [curve.title for curve in curves] == titles
    assert "Base: loss, nats per token\nsmoothed: 8 → 4\n█▁\n" in text
    loss, rewards = curves[0].series, curves[-1].series
    assert loss[0].points == [(1, 8.0), (2, 4.0)] and rewards[1].points == [(1, 0.25), (2, 0.5)]
    assert rewards[0].points[0] == (1, pytest.approx(0.25))
    marks = [(series.name, series.points) for series in rewards if series.points][2:]
    assert marks == [("pass@1", [(2, 0.3125)]), ("pass@8", [(2, 0.625)])]


def test_figures_read_well():
    said = ", ".join(map(duration, (8.24, 59.6, 312, 3599.7, 13860, None)))
    assert said == "8.2 s, 1 min 0 s, 5 min 12 s, 1 h 0 min, 3 h 51 min, -"
    assert ", ".join(map(rounded, (4096, 3342336, 561e6, 1879e6, 1.19e14))) == "4,096, 3.34 M, 561 M, 1.88 B, 1.19e14"
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁" and sparkline([1.0] * 500) == "▁" * 72
    line = sparkline([float(i) for i in range(500)])
    assert len(line) == 72 and line[0] == "▁" and line[-1] == "█"


def test_a_card_costs_what_is_known_or_given_and_nothing_is_guessed():
    hour = [{"event": "end", "seconds_in_all": 3600}]
    h100 = run("base", plan(), *hour, device="NVIDIA H100 80GB HBM3", ranks=8)
    other, cpu = run("base", plan(), *hour, device="Radeon X", ranks=2), run("dataset", *hour)
    how = "1 h 0 min of runs at $24.00 an hour; 1 of the runs is without a known card and not in it"
    assert cost([h100, cpu], None) == ("$24.00", how)
    assert cost([h100, other], 1.5) == ("$15.00", "2 h 0 min of runs at $12.00 or $3.00 an hour")
    assert cost([cpu], 0.25)[0] == "$0.25" and cost([other, cpu], None)[0] == "-"
    assert "no price is known for this machine; --dollars-per-hour=PRICE sets one" in build([cpu])[0]
    text = build([h100])[0]
    assert "- **cost**: $24.00" in text and "- **hardware**: 8 x NVIDIA H100 80GB HBM3, a CPU, 2 cores" in text
    monthly = {name: run("base", *hour, device=f"NVIDIA {name}-SXM4-40GB", ranks=1) for name in ("A100", "V100")}
    assert [cost([events], None)[0] for events in monthly.values()] == ["$1.79", "$0.55"]


def core(tag="base-d4-000002", settings=None, **values):
    tasks = [
        {"event": "core_task", "task": "squad", "n": 100, "accuracy": 0.5, "stderr": 0.03, "centered": 0.5},
        {"event": "core_task", "task": "piqa", "n": 200, "accuracy": 0.75, "stderr": 0.02, "centered": 0.5},
    ]
    mean = {"event": "core", "stderr": 0.025, "tasks": ["squad", "piqa"], **values}
    return run("base_eval", *tasks, mean, time=30.0, tag=tag, settings=settings or {})


def test_core_stands_with_its_standard_error_and_its_tasks_and_a_part_of_it_is_not_called_core():
    text, part = (build([run("base", plan()), core(value=0.5, partial=partial)])[0] for partial in (False, True))
    assert "- **CORE after base**: 0.500" in text and "CORE after base" not in part
    assert "| CORE | 0.5000 ± 0.0250 | - | - | - | - | 2 tasks |" in text
    assert "| partial CORE | 0.5000 ± 0.0250 |" in part
    assert "## CORE, task by task" in text and "| piqa | 75.0 ± 2.0 | 0.5000 | 200 |" in text


def test_answers_of_a_base_model_do_not_hide_its_core():
    answers = run("chat_eval", task("base", "GSM8K", 0.1), tag="base-d4")
    assert set(grades([core(value=0.5), answers])) == {"CORE", "GSM8K"}


def test_core_of_another_stage_or_of_another_model_is_not_that_of_base():
    runs = [core(value=0.25, settings={"source": "sft"}, max_per_task=50)]
    runs += [core(value=0.5, tag="gpt2", settings={"source": "base", "hf_path": "/models/gpt2"})]
    text = build(runs)[0]
    assert "| CORE | - | - | 0.2500 ± 0.0250 | - | - | 2 tasks of 50 items at most |" in text
    assert "not the newest or not trained here: gpt2." in text and "| CORE | 0.5" not in text


def test_means_of_part_of_the_problems_are_called_partial_and_their_counts_say_of_how_many():
    means = [{"event": kind, "source": "sft", "value": 0.25, "stderr": 0.01} for kind in ("chatcore", "chatcore_cat")]
    means = [{**event, "tasks": ["ARC-Easy"], "partial": True} for event in means]
    text = build([chat_eval("sft", task("sft", "ARC-Easy", 0.5, of=2376, partial=True), *means)])[0]
    assert "| ARC-Easy, % | - | - | 50.0 ± 1.0 | - | 25.0 | 1,000 of 2,376 |" in text
    for name in ("partial ChatCORE", "partial ChatCORE-cat"):
        assert f"| {name} | - | - | 0.2500 ± 0.0100 | - | - | 1 tasks |" in text
    assert "ChatCORE after SFT" not in text


def test_bits_per_byte_pass_at_k_and_parts_of_tasks_have_their_errors():
    loss = run("base_loss", {"event": "bpb", "split": "val", "bpb": 1.5, "stderr": 0.02, "documents": 135})
    loss += [{**loss[-1], "event": "bpb_quick", "bpb_quick": 1.75}]
    parts = {"STEM": {"accuracy": 0.25, "stderr": 0.02, "n": 400}, "law": {"accuracy": 0.5, "stderr": 0.1, "n": 25}}
    lenient = {"accuracy": 0.625, "stderr": 0.02, "n": 1000}
    graded = task("sft", "MMLU", 0.5, parts=parts, pass_at={"4": {"value": 0.75, "stderr": 0.03}}, flexible=lenient)
    text = build([loss, chat_eval("sft", graded)])[0]
    assert "| bits per byte, validation | 1.5000 ± 0.0200 | - | - | - | - | 135 documents |" in text
    assert "| MMLU pass@4, % | - | - | 75.0 ± 3.0 | - | - | 1,000 |" in text
    assert (
        "| MMLU by the last number anywhere, % | - | - | 62.5 ± 2.0 | - | - | 1,000 |" in text
    )  # chat_eval alone said it
    assert "\nSTEM: 25.0 ± 2.0 % of 400\nlaw: 50.0 ± 10.0 % of 25\n" in text


def test_perplexity_accuracy_and_gap_of_the_last_validation_are_shown():
    evals = [{"event": "eval", "step": n, "val_nats": 3.5 - n / 2, "accuracy": 0.256, "gap": 0.0625} for n in (0, 1)]
    text = build([run("base", plan(num_steps=1), step(0, 3.0), *[{**e, "perplexity": 20.0855} for e in evals])])[0]
    assert "| nats per token, validation | 3.0000 |" in text and "| perplexity, validation | 20.09 |" in text
    assert "| next token right, validation | 25.6% |" in text
    assert "| nats above the training loss, validation | +0.0625 |" in text


def test_the_loss_of_an_unfinished_run_is_forecast_by_its_power_law():
    """5 steps^-0.1 comes to 2.5059 after 1,000; the first steps, which follow no law, are not in it."""
    steps = [step(i, 5 * (i + 1) ** -0.1 if i > 20 else 11.0) for i in range(50)]
    rows = build([run("base", plan(num_steps=1000), *steps)])[0]
    assert "| loss at the end, forecast | 2.5059 | - | - | - |" in rows
    assert "| loss at the end, forecast | - | - | - | - |" in build([run("base", plan(num_steps=50), *steps)])[0]
    assert "| loss at the end, forecast | - | - | - | - |" in build([run("base", plan(num_steps=99), *steps[:19])])[0]


def test_stops_resumptions_and_spikes_can_be_seen():
    stop = {"event": "stopped", "step": 2, "reason": "stopped by SIGTERM"}
    first = run("base", plan(num_steps=4), step(0, 5.0), step(1, 4.0), stop)
    second = run("base", plan(first_step=2, num_steps=4), step(2, 9.0, spike=True), step(3, 3.0), time=100.0)
    text, curves = build([first, second])
    series = {one.name: one.points for one in curves[0].series}
    assert series["spike"] == [(3, 9.1)] and series["resumed"] == [(2, 5.1)]
    html = to_html(text, curves)
    assert "after step 2: stopped by SIGTERM" in text and "resumed at step 2; not finished, 4 steps done" in text
    assert "| spikes | 1 | - | - | - |" in text and "| resumed at step | 2 | - | - | - |" in text
    assert 'class="cross hue0"' in html and 'class="flag hue0"' in html and "<title>spike 9.1 at step 3</title>" in html


def test_commands_can_be_pasted_into_a_shell():
    words = ["/x y/scripts/chat_cli.py", "-p", "it's $HOME; rm -rf `x`"]
    assert shlex.split(command([{"argv": words}])) == ["python", "-m", "scripts.chat_cli", *words[1:]]


def test_of_a_long_answer_the_beginning_is_shown_and_its_length_said():
    long = run("sft", plan(), {"event": "sample", "step": 1, "prompt": "x", "text": "A" * 10_000_000})
    html, text = to_html(*build([long])), build([long])[0]
    for face in (html, text):
        assert len(face) < 40_000 and "AAA … [8,000 of 10,000,000 characters]" in face


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH")
def test_in_a_browser_nothing_runs_and_nothing_is_wider_than_the_window(tmp_path):
    """Leaves screenshots in tmp_path."""
    long = {"event": "sample", "step": 1, "prompt": HOSTILE, "text": "A" * 20_000 + "\n" * 999 + "שלום" + HOSTILE}
    (tmp_path / "report.html").write_text(to_html(*build([*full_set(), *hostile_set(), run("rl", plan(), long)])))
    url, last = f"file://{tmp_path}/report.html", "document.querySelector('main > details:last-child')"
    browser = Chromium(tmp_path / "profile")
    try:
        tab = Tab(browser, url, ready=last)
        for width, scheme in ((360, "dark"), (1200, "light")):
            tab.resize(width, 900, scheme)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.picture(tmp_path / f"report-{width}-{scheme}.png", whole=True)
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert asked == [url] and tab.complaints() == []
    finally:
        browser.close()


def write(base_dir, name, runs):
    (base_dir / "records").mkdir(parents=True, exist_ok=True)
    (base_dir / "records" / name).write_text("".join(json.dumps(event) + "\n" for event in runs), encoding="utf-8")


def test_generate_writes_both_faces_and_reset_puts_the_records_aside(base_dir, capsys, monkeypatch):
    for i, events in enumerate(full_set()):
        write(base_dir, f"{i}.jsonl", events)
    report.main()
    printed = capsys.readouterr().out
    assert (base_dir / "report" / "report.md").read_text(encoding="utf-8") in printed
    assert (base_dir / "report" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    monkeypatch.setattr(report, "action", "reset")
    report.main()
    assert len(list((base_dir / "records").glob("before-*/*.jsonl"))) == len(full_set())
    report.main()  # a second time there is nothing to do
    assert "nothing to put aside" in capsys.readouterr().out
    monkeypatch.setattr(report, "action", "generate")
    with pytest.raises(UserError, match="no records in"):
        report.main()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"event": "start"\n{}\n', "damaged record .*bad.jsonl: 1: not a JSON object"),
        (b"\xff\xfe\n", "damaged record .*bad.jsonl: .*codec"),
        (b"[1]\n", "damaged record .*bad.jsonl: not events"),
        (b'{"event": "step", "time": 1}\n', "damaged record .*bad.jsonl: not events .* the first is a start"),
    ],
)
def test_a_damaged_record_is_one_line_that_names_it(base_dir, content, said):
    write(base_dir, "bad.jsonl", [])
    (base_dir / "records" / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_runs(base_dir / "records")
    assert "\n" not in str(caught.value)


def test_an_empty_record_is_left_out_and_said(base_dir, capsys):
    write(base_dir, "a.jsonl", run("base", plan()))
    write(base_dir, "b.jsonl", [])
    assert len(read_runs(base_dir / "records")) == 1 and "b.jsonl is empty: left out" in capsys.readouterr().out
