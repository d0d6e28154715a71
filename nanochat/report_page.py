"""
A report as a list of sections, and its two faces: Markdown for terminals and repositories, one HTML page for people.

Promises: whatever a model, a user or a file name put into a text is shown and never interpreted, in both. The page is
one file without scripts that loads nothing, follows the reader's light or dark scheme, and scrolls wide tables inside
their own box. Knows nothing of records or stages.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")
SPARKS = "▁▂▃▄▅▆▇█"
KEYS = {"line": "—", "faint": "—", "mark": "●", "ring": "○"}  # what stands for a series in a legend
DRAWN, LISTED = 400, 12  # points of a line in a diagram, and marks spelled out in Markdown; more are thinned evenly
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 268, 52, 16, 28, 42  # of a diagram and its margins, in its own units
# Control characters show as their pictures: a terminal would obey them, and HTML has no NUL.
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | dict.fromkeys(range(127, 160), 0xFFFD)


@dataclass(frozen=True)
class Figures:
    """The few numbers that a reader looks for first."""

    rows: Sequence[tuple[str, str, str]]  # label, value, note


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Cells are text; one letter per column says how it is set: l left, r right, c code."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    kinds: str


@dataclass(frozen=True)
class Series:
    """(x, y) points of one kind: a line, a faint line behind it, filled or hollow marks."""

    name: str  # for the legend; "" = not in it
    look: Literal["line", "faint", "mark", "ring"]
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A small diagram over training steps. The first series has points: Markdown shows it as a sparkline."""

    title: str
    unit: str  # of the vertical axis
    series: Sequence[Series]


@dataclass(frozen=True)
class Curves:
    """Diagrams side by side."""

    items: Sequence[Curve]


@dataclass(frozen=True)
class Sample:
    """What a model wrote: the answer to a question, or the continuation of a prompt."""

    prompt: str
    text: str
    is_chat: bool = True
    verdict: str = ""


@dataclass(frozen=True)
class Samples:
    """Samples under one title."""

    title: str
    items: Sequence[Sample]


@dataclass(frozen=True)
class Folded:
    """Text as it is, shown on request."""

    title: str
    text: str


Block = str | Figures | Facts | Table | Curves | Samples | Folded  # a str is a paragraph
Section = tuple[str, Sequence[Block]]  # a title, which may be empty; without blocks it is not shown


def visible(text: str) -> str:
    """The text with control characters as pictures, and without halves of surrogate pairs, which no file can hold."""
    return text.replace("\r\n", "\n").encode("utf-8", "replace").decode().translate(VISIBLE)


def thinned(values: Sequence[T], limit: int) -> Sequence[T]:
    """At most `limit` of the values, evenly spaced, with the first and the last."""
    if len(values) <= limit:
        return values
    return [values[i * (len(values) - 1) // (limit - 1)] for i in range(limit)]


def course(series: Series) -> str:
    """Where a series begins and where it ends."""
    first, final = series.points[0][1], series.points[-1][1]
    return f"{first:.4g} → {final:.4g}" if len(series.points) > 1 else f"{first:.4g}"


# -----------------------------------------------------------------------------
# Markdown


def to_markdown(title: str, subtitle: str, sections: Iterable[Section]) -> str:
    """The report as Markdown, ending in a newline."""
    parts = [f"# {marked(title)}", marked(subtitle)]
    for head, blocks in sections:
        if blocks:
            parts += [head and f"## {marked(head)}", *map(block_to_markdown, blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def block_to_markdown(block: Block) -> str:
    """One block. Text of models is indented by four, where Markdown interprets nothing."""
    match block:
        case str():
            return marked(block)
        case Figures(rows):
            return "\n".join(f"- **{marked(a)}**: {marked(b)}{note and f' ({marked(note)})'}" for a, b, note in rows)
        case Facts(rows):
            return "\n".join(f"- {marked(name)}: {marked(text)}" for name, text in rows)
        case Table(head, rows, kinds):
            rule = ["---:" if kind == "r" else "---" for kind in kinds]
            body = [[code_span(c) if k == "c" else marked(c) for c, k in zip(row, kinds, strict=True)] for row in rows]
            return "\n".join(f"| {' | '.join(cells)} |" for cells in [[*map(marked, head)], rule, *body])
        case Curves(items):
            return "\n\n".join(map(curve_to_markdown, items))
        case Samples(title, items):
            forms = {True: "> {0.prompt}\n{0.text}", False: "[{0.prompt}]{0.text}"}
            texts = [forms[item.is_chat].format(item) + (item.verdict and f"\n({item.verdict})") for item in items]
            return f"### {marked(title)}\n\n{indented((chr(10) * 2).join(texts))}"
        case Folded(title, text):
            return f"<details><summary>{shown(one_line(title))}</summary>\n\n{indented(text)}\n\n</details>"


def curve_to_markdown(curve: Curve) -> str:
    """Where it begins and ends, a sparkline, and the marks in words."""
    main = curve.series[0]
    parts = [f"{marked(curve.title)}, {marked(curve.unit)}: {course(main)}"]
    parts.append(indented(sparkline([y for _, y in main.points])))
    for series in curve.series:
        if series.points and series.look in ("mark", "ring"):
            listed = thinned(series.points, LISTED)
            count = f" ({len(listed)} of {len(series.points)})" if len(listed) < len(series.points) else ""
            parts.append(f"{marked(series.name)}{count}: " + ", ".join(f"{y:.4g} at step {x:,.0f}" for x, y in listed))
    return "\n\n".join(parts)


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def marked(text: str) -> str:
    """The text as Markdown that shows it, in one line."""
    return re.sub(r"([\\`*<|\[\]])", r"\\\1", one_line(visible(text)))


def code_span(text: str) -> str:
    """The text as code in a table cell, where | must be escaped even in code."""
    text = one_line(visible(text)).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else text and f"`{text}`"


def indented(text: str) -> str:
    """The text as a block of code."""
    return "\n".join("    " + line for line in visible(text).split("\n"))


def sparkline(values: Sequence[float], width: int = 72) -> str:
    """A curve in one line of text, from the lowest value to the highest."""
    picked = thinned(values, width)
    low, high = min(picked), max(picked)
    return "".join(SPARKS[round((value - low) / ((high - low) or 1) * (len(SPARKS) - 1))] for value in picked)


# -----------------------------------------------------------------------------
# HTML


def to_html(title: str, subtitle: str, sections: Iterable[Section]) -> str:
    """The report as one HTML page."""
    body = [f"<header><h1>{shown(title)}</h1><p>{shown(subtitle)}</p></header>"]
    for head, blocks in sections:
        if blocks:
            heading = f"<h2>{shown(head)}</h2>" if head else ""
            body.append(f"<section>{heading}{''.join(map(block_to_html, blocks))}</section>")
    return PAGE.format(title=shown(title), style=STYLE, body="\n".join(body))


def shown(text: str) -> str:
    """The text as HTML that shows it."""
    return html.escape(visible(text))


def block_to_html(block: Block) -> str:
    """One block as HTML."""
    match block:
        case str():
            return f"<p>{shown(block)}</p>"
        case Figures(rows):
            cells = [f"<dt>{shown(a)}</dt><dd>{shown(b)}<small>{shown(note)}</small></dd>" for a, b, note in rows]
            return f'<dl class="figures">{"".join(f"<div>{cell}</div>" for cell in cells)}</dl>'
        case Facts(rows):
            return f'<dl class="facts">{"".join(f"<dt>{shown(a)}</dt><dd>{shown(b)}</dd>" for a, b in rows)}</dl>'
        case Table():
            return table_to_html(block)
        case Curves(items):
            return f'<div class="curves">{"".join(map(curve_to_html, items))}</div>'
        case Samples(title, items):
            return f'<h3>{shown(title)}</h3><div class="samples">{"".join(map(sample_to_html, items))}</div>'
        case Folded(title, text):
            return f"<details><summary>{shown(title)}</summary><pre>{shown(text)}</pre></details>"


def table_to_html(table: Table) -> str:
    """A table in a box that scrolls by itself, also by keyboard."""

    def line(cells: Sequence[str], tag: str) -> str:
        forms = {"l": "<{0}>{1}</{0}>", "r": '<{0} class="r">{1}</{0}>', "c": "<{0}><code>{1}</code></{0}>"}
        kinds = table.kinds if tag == "td" else table.kinds.replace("c", "l")
        joined = "".join(forms[kind].format(tag, shown(cell)) for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{joined}</tr>"

    body = "".join(line(row, "td") for row in table.rows)
    return f'<div class="scroll" tabindex="0"><table><thead>{line(table.head, "th")}</thead>{body}</table></div>'


def sample_to_html(sample: Sample) -> str:
    """A continuation with its prompt in bold, or a question above its answer."""
    if not sample.is_chat:
        return f'<div class="sample"><p><b>{shown(sample.prompt)}</b>{shown(sample.text)}</p></div>'
    verdict = f"<small>{shown(sample.verdict)}</small>" if sample.verdict else ""
    return f'<div class="sample"><p class="asked">{shown(sample.prompt)}</p><p>{shown(sample.text)}</p>{verdict}</div>'


def curve_to_html(curve: Curve) -> str:
    """A diagram with its title, course and legend."""
    named = [series for series in curve.series if series.name and series.points]
    keys = "".join(f'<span class="{one.look}"><i>{KEYS[one.look]}</i> {shown(one.name)}</span>' for one in named)
    title = f"<b>{shown(curve.title)}</b> <span>{course(curve.series[0])}</span>"
    return f"<figure><figcaption>{title}</figcaption>{svg(curve)}<p>{keys}</p></figure>"


def round_ticks(low: float, high: float, count: int = 5) -> tuple[list[float], int]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose low and high, and the decimals they are written with."""
    wanted = ((high - low) or abs(high) or 1.0) / count
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted * (1 - 1e-9))
    first, final = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [i * step for i in range(first, max(final, first + 1) + 1)], decimals


def svg(curve: Curve) -> str:
    """The diagram: horizontal rules at round values, steps below, lines, then marks that say their value on hover."""
    xs, ys = zip(*[point for series in curve.series for point in series.points], strict=True)
    (x_ticks, x_decimals), (y_ticks, y_decimals) = round_ticks(0, max(xs)), round_ticks(min(ys), max(ys))
    x_high, y_low, y_high = max(*xs, 1), y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[str, str]:
        across = LEFT + x / x_high * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f}", f"{TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<text x="0" y="12">{shown(curve.unit)}</text>']
    for y in y_ticks:
        down = place(0, y)[1]
        parts.append(f'<path d="M{LEFT} {down}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{down}" dy="4" class="y">{y:,.{y_decimals}f}</text>')
    for x in x_ticks:
        if x <= x_high:
            parts.append(f'<text x="{place(x, y_low)[0]}" y="{HEIGHT - 24}" class="x">{x:,.{x_decimals}f}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" class="y">step</text>')
    for series in curve.series:
        if series.look in ("line", "faint"):
            line = " ".join(",".join(place(*point)) for point in thinned(series.points, DRAWN))
            parts.append(f'<polyline class="{series.look}" points="{line}"/>' if line else "")
    for series in curve.series:
        if series.look in ("mark", "ring"):
            for x, y in series.points:
                across, down = place(x, y)
                hover = f"<title>{shown(series.name)}: {y:.4g} at step {x:,.0f}</title>"
                parts.append(f'<circle class="{series.look}" cx="{across}" cy="{down}" r="4">{hover}</circle>')
    label = f"{curve.title}, {curve.unit}, {course(curve.series[0])}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{shown(label)}">{"".join(parts)}</svg>'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1d1e21; --muted: #696b71; --rule: #e2e0d9;
  --accent: #0b6b63; --text: system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
  --read: Charter, Georgia, "DejaVu Serif", serif; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16171a; --ink: #e7e5e0; --muted: #9b9da4; --rule: #303238; --accent: #6cc5b8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 var(--text); }
main { max-width: 1080px; margin: auto; padding: clamp(2.5rem, 7vw, 6rem) clamp(1rem, 4vw, 3rem); }
header p, small, figcaption span, figure p, dt, th, summary { color: var(--muted); }
h1 { font: 600 clamp(2rem, 5vw, 3rem)/1.1 var(--read); margin: 0 0 .5rem; }
h2 { font: 600 1.5rem/1.3 var(--read); margin: 0 0 1.5rem; }
h3 { font-size: 1rem; margin: 2.5rem 0 1rem; }
h2 + h3 { margin-top: 0; }
p { max-width: 44rem; overflow-wrap: anywhere; }
header p { margin: 0; }
section { margin-top: clamp(3rem, 6vw, 5rem); }
dd { margin: 0; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1.5rem; margin: 0;
  padding: 1.75rem 0; border: solid var(--rule); border-width: 1px 0; }
.figures dt, .figures small, figure p, th, td { font-size: .875rem; }
.figures dd { font: 1.75rem/1.4 var(--read); color: var(--accent); font-variant-numeric: lining-nums; }
.figures small { display: block; font-family: var(--text); }
.facts { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .5rem 2rem; margin: 1rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .6rem 1.5rem .6rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 500; white-space: nowrap; }
td:first-child { min-width: 9rem; }
th:last-child, td:last-child { padding-right: 0; }
.r { text-align: right; white-space: nowrap; }
code, pre { font: .8125rem/1.6 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
td code { display: block; min-width: 20rem; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .75rem 0 1.5rem; }
summary { cursor: pointer; padding: .35rem 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 3rem 3.5rem; }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; margin-bottom: .75rem; }
figure p { display: flex; flex-wrap: wrap; gap: 0 1.25rem; margin: .5rem 0 0; }
figure p .line i { color: var(--accent); } figure p .faint i { color: var(--accent); opacity: .4; }
figure p i { font-style: normal; } figure p .mark i, figure p .ring i { color: var(--ink); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--muted); font: 12px var(--text); font-variant-numeric: tabular-nums; }
svg .y { text-anchor: end; } svg .x { text-anchor: middle; }
svg path { stroke: var(--rule); } svg polyline { fill: none; stroke: var(--accent); stroke-linejoin: round; }
svg .line { stroke-width: 2; } svg .faint { opacity: .3; }
svg circle { stroke: var(--ink); stroke-width: 1.5; } svg .mark { fill: var(--ink); } svg .ring { fill: var(--paper); }
@media (max-width: 34rem) { svg text { font-size: 16px; } }
.samples { columns: 24rem 2; column-gap: 3.5rem; }
.sample { break-inside: avoid; padding: 1rem 0; border-top: 1px solid var(--rule); font-family: var(--read); }
.sample p { margin: 0; white-space: pre-wrap; tab-size: 4; }
.sample .asked { color: var(--accent); font: 500 .9375rem/1.6 var(--text); margin-bottom: .5rem; }
.sample small { display: block; font-family: var(--text); margin-top: .5rem; }
"""
