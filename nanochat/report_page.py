"""A report as a list of sections, and its two faces: Markdown for terminals and repositories, one HTML page for people.

Promises: whatever a model, a user or a file name put into a text is shown and never interpreted, in both; of a text
longer than LONGEST the beginning is shown and its length is said. The page is one file without scripts that loads
nothing, follows the reader's light or dark scheme, and scrolls wide tables inside their own box. Knows nothing of
records or stages.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

T = TypeVar("T")
SPARKS = "▁▂▃▄▅▆▇█"
KEYS = {"mark": "●", "ring": "○", "cross": "×", "flag": "┆", "dot": "•"}  # what stands for a series in a legend
DRAWN, LISTED = 400, 12  # points of a line in a diagram, and marks spelled out in Markdown; more are thinned evenly
LONGEST = 8000  # characters of a text; a model that repeats itself writes megabytes
HUES = 6  # lines that can be told apart in one diagram
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 268, 52, 16, 28, 42  # of a diagram and its margins, in its own units
# Control characters show as their pictures: a terminal would obey them, and HTML has no NUL. Marks that turn the
# direction of what follows, and separators that some programs take for line ends, show as their numbers.
TURNING = (0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
VISIBLE: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
VISIBLE |= dict.fromkeys(range(127, 160), 0xFFFD) | {code: f"<U+{code:04X}>" for code in TURNING}


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
    """Cells are text; one letter per column says how it is set: l left, r right, c a command, v a value as code."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    kinds: str


@dataclass(frozen=True)
class Series:
    """(x, y) points of one kind: a line, a faint line, filled or hollow marks, crosses, dots, or upright lines at x."""

    name: str  # for the legend; "" = not in it
    look: Literal["line", "faint", "mark", "ring", "cross", "flag", "dot"]
    points: Sequence[tuple[float, float]]
    hue: int = 0  # which of the HUES


@dataclass(frozen=True)
class Curve:
    """A small diagram. The first series has points. Markdown shows every first line of a hue as a sparkline."""

    title: str
    unit: str  # of the vertical axis
    series: Sequence[Series]
    x: str = "step"  # what the horizontal axis counts
    log: bool = False  # whether that axis is logarithmic; then every x is more than 0


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


def cut(text: str) -> str:
    """The text, or the beginning of a long one and its length."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … [{LONGEST:,} of {len(text):,} characters]"


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
            body = [[code_span(c) if k in "cv" else marked(c) for c, k in zip(row, kinds, strict=True)] for row in rows]
            return "\n".join(f"| {' | '.join(cells)} |" for cells in [[*map(marked, head)], rule, *body])
        case Curves(items):
            return "\n\n".join(map(curve_to_markdown, items))
        case Samples(title, items):
            forms = {True: "> {0.prompt}\n{0.text}", False: "[{0.prompt}]{0.text}"}
            told = [replace(item, prompt=cut(item.prompt), text=cut(item.text)) for item in items]
            texts = [forms[item.is_chat].format(item) + (item.verdict and f"\n({item.verdict})") for item in told]
            return f"### {marked(title)}\n\n{indented((chr(10) * 2).join(texts))}"
        case Folded(title, text):
            return f"<details><summary>{shown(one_line(title))}</summary>\n\n{indented(cut(text))}\n\n</details>"


def curve_to_markdown(curve: Curve) -> str:
    """Where it begins and ends, a sparkline for each line, and the marks in words."""
    parts = [f"{marked(curve.title)}, {marked(curve.unit)}: {course(curve.series[0])}"]
    several = is_comparison(curve)
    for series in curve.series:
        if series.points and series.look == "line":
            told = f"{one_line(series.name)}: {course(series)}\n" if several else ""
            parts.append(indented(told + sparkline([y for _, y in series.points])))
        elif series.points and series.look != "faint" and not several:
            listed = thinned(series.points, LISTED)
            count = f" ({len(listed)} of {len(series.points)})" if len(listed) < len(series.points) else ""
            where = [f"{curve.x} {tick_text(x)}" if series.look == "flag" else at(curve, x, y) for x, y in listed]
            parts.append(f"{marked(series.name)}{count}: {', '.join(where)}")
    return "\n\n".join(parts)


def is_comparison(curve: Curve) -> bool:
    """Whether the lines of the diagram belong to several runs."""
    return any(series.hue for series in curve.series)


def at(curve: Curve, x: float, y: float) -> str:
    """A point in words."""
    return f"{y:.4g} at {curve.x} {tick_text(x, 0 if curve.x == 'step' else 2)}"


def scientific(x: float) -> str:
    """Three digits of a large number: 1.19e14."""
    return re.sub(r"e\+0*", "e", f"{x:.3g}")


def tick_text(x: float, decimals: int = 0) -> str:
    """A number on an axis, short: 800, 25 M, 1.5 B, 2e18."""
    if x >= 1e12:
        return scientific(x)
    if x >= 1e6:
        return f"{x / 1e6:.4g} M" if x < 1e9 else f"{x / 1e9:.4g} B"
    return f"{x:,.{decimals}f}"


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def marked(text: str) -> str:
    """The text as Markdown that shows it, in one line."""
    return re.sub(r"([\\`*<|\[\]])", r"\\\1", one_line(visible(cut(text))))


def code_span(text: str) -> str:
    """The text as code in a table cell, where | must be escaped even in code."""
    text = one_line(visible(cut(text))).replace("|", "\\|")
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
    return html.escape(visible(cut(text)))


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
        forms = {"l": "<{0}>{1}</{0}>", "r": '<{0} class="r">{1}</{0}>', "v": "<{0}><code>{1}</code></{0}>"}
        forms["c"] = '<{0} class="c"><code>{1}</code></{0}>'
        kinds = table.kinds if tag == "td" else table.kinds.replace("c", "l").replace("v", "l")
        joined = "".join(forms[kind].format(tag, shown(cell)) for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{joined}</tr>"

    body = "".join(line(row, "td") for row in table.rows)
    return f'<div class="scroll" tabindex="0"><table><thead>{line(table.head, "th")}</thead>{body}</table></div>'


def sample_to_html(sample: Sample) -> str:
    """A continuation with its prompt in bold, or a question above its answer."""
    if not sample.is_chat:
        text = f"<b>{shown(sample.prompt)}</b>{shown(sample.text)}"
        return f'<div class="sample"><p dir="auto">{text}</p></div>'
    verdict = f"<small>{shown(sample.verdict)}</small>" if sample.verdict else ""
    asked = f'<p class="asked" dir="auto">{shown(sample.prompt)}</p>'
    return f'<div class="sample">{asked}<p dir="auto">{shown(sample.text)}</p>{verdict}</div>'


def curve_to_html(curve: Curve) -> str:
    """A diagram with its title, course and legend."""
    named = [series for series in curve.series if series.name and series.points]
    keys = "".join(f"<span>{key(one)} {shown(one.name)}</span>" for one in named)
    ends = "" if is_comparison(curve) else f" <span>{course(curve.series[0])}</span>"
    title = f"<b>{shown(curve.title)}</b>{ends}"
    return f"<figure><figcaption>{title}</figcaption>{svg(curve)}<p>{keys}</p></figure>"


def key(series: Series) -> str:
    """What stands for a series in the legend: a piece of the line as it is drawn, or its mark."""
    if series.look not in ("line", "faint"):
        return f"<i>{KEYS[series.look]}</i>"
    line = f'<polyline class="{series.look} hue{series.hue}" points="0,3 28,3"/>'
    return f'<svg class="key" viewBox="0 0 28 6" aria-hidden="true">{line}</svg>'


def round_ticks(low: float, high: float, count: int = 5) -> tuple[list[float], int]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose low and high, and the decimals they are written with."""
    wanted = ((high - low) or abs(high) or 1.0) / count
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted * (1 - 1e-9))
    first, final = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [i * step for i in range(first, max(final, first + 1) + 1)], decimals


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between low and high, or just the powers where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) < 4 else (1,)
    inside = [factor * 10.0**power for power in powers for factor in factors]
    return [x for x in inside if low * (1 - 1e-9) <= x <= high * (1 + 1e-9)] or [low]


def svg(curve: Curve) -> str:
    """The diagram: rules at round values, what is counted below, lines, then marks that say their value on hover."""
    xs, ys = zip(*[point for series in curve.series for point in series.points], strict=True)
    y_ticks, y_decimals = round_ticks(min(ys), max(ys))
    x_low, x_high, y_low, y_high = (min(xs) if curve.log else 0), max(xs), y_ticks[0], y_ticks[-1]
    x_ticks, x_decimals = (log_ticks(x_low, x_high), 0) if curve.log else round_ticks(0, x_high)

    def place(x: float, y: float) -> tuple[str, str]:
        share = math.log(x / x_low) / (math.log(x_high / x_low) or 1) if curve.log else x / (x_high or 1)
        across = LEFT + share * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f}", f"{TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<text x="0" y="12">{shown(curve.unit)}</text>']
    for y in y_ticks:
        down = place(x_high, y)[1]
        parts.append(f'<path d="M{LEFT} {down}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{down}" dy="4" class="y">{tick_text(y, y_decimals)}</text>')
    for x in x_ticks:
        if x <= x_high * (1 + 1e-9):
            across = place(x, y_low)[0]
            parts.append(f'<text x="{across}" y="{HEIGHT - 24}" class="x">{tick_text(x, x_decimals)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" class="y">{shown(curve.x)}</text>')
    for series in curve.series:
        if series.look in ("line", "faint"):
            line = " ".join(",".join(place(*point)) for point in thinned(series.points, DRAWN))
            parts.append(f'<polyline class="{series.look} hue{series.hue}" points="{line}"/>' if line else "")
    for series in curve.series:
        if series.look not in ("line", "faint"):
            parts += [svg_mark(curve, series, point, place(*point)) for point in thinned(series.points, DRAWN)]
    label = f"{curve.title}, {curve.unit}, {course(curve.series[0])}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{shown(label)}">{"".join(parts)}</svg>'


def svg_mark(curve: Curve, series: Series, point: tuple[float, float], place: tuple[str, str]) -> str:
    """One point of a series at its place in the diagram, with its value on hover."""
    (across, down), look = place, f'class="{series.look} hue{series.hue}"'
    hover = f"<title>{shown(series.name)}: {at(curve, *point)}</title>"
    if series.look == "flag":
        hover = f"<title>{shown(series.name)}: {curve.x} {tick_text(point[0])}</title>"
        return f'<path {look} d="M{across} {TOP}V{HEIGHT - BOTTOM}">{hover}</path>'
    if series.look == "cross":
        return f'<path {look} d="M{across} {down}m-4 -4l8 8m0 -8l-8 8">{hover}</path>'
    radius = 2.5 if series.look == "dot" else 4
    return f'<circle {look} cx="{across}" cy="{down}" r="{radius}">{hover}</circle>'


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
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1d1e21; --muted: #696b71; --rule: #e2e0d9; --shade: #d5d2c9;
  --accent: #0b6b63; --hue1: #b3521e; --hue2: #3b5bb5; --hue3: #8a3a8f; --hue4: #8a6d00; --hue5: #55595f;
  --text: system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
  --read: Charter, Georgia, "DejaVu Serif", serif; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16171a; --ink: #e7e5e0; --muted: #9b9da4; --rule: #303238; --shade: #42454d; --accent: #6cc5b8;
    --hue1: #f0a070; --hue2: #92aef5; --hue3: #d79adc; --hue4: #dcc15a; --hue5: #b4b7bd; } }
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
.figures dd { font: 1.5rem/1.5 var(--read); color: var(--accent); font-variant-numeric: lining-nums; }
.figures small { display: block; font-family: var(--text); }
.facts { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .5rem 2rem; margin: 1rem 0; }
/* Where there is more to scroll to, the edge is shaded: the cover in front of the shade scrolls along. */
.scroll { overflow-x: auto; margin: 1rem 0; background:
  linear-gradient(to left, var(--paper) 50%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .6rem 1.5rem .6rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 500; white-space: nowrap; }
td:first-child { min-width: 9rem; }
th:last-child, td:last-child { padding-right: 0; }
td:last-child:not(.r) { min-width: 8rem; }
.r { text-align: right; white-space: nowrap; }
code, pre { font: .8125rem/1.6 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
td code { display: block; overflow-wrap: anywhere; } .c code { min-width: 20rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .75rem 0 1.5rem; }
summary { cursor: pointer; padding: .35rem 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 3rem 3.5rem; }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; margin-bottom: .75rem; }
figure p { display: flex; flex-wrap: wrap; gap: 0 1.25rem; margin: .5rem 0 0; }
.hue0 { --hue: var(--accent); } .hue1 { --hue: var(--hue1); } .hue2 { --hue: var(--hue2); }
.hue3 { --hue: var(--hue3); } .hue4 { --hue: var(--hue4); } .hue5 { --hue: var(--hue5); }
figure p i { font-style: normal; font-weight: 600; color: var(--ink); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg.key { display: inline-block; width: 28px; vertical-align: middle; }
svg text { fill: var(--muted); font: 12px var(--text); font-variant-numeric: tabular-nums; }
svg .y { text-anchor: end; } svg .x { text-anchor: middle; }
svg path { stroke: var(--rule); fill: none; } svg polyline { fill: none; stroke: var(--hue); stroke-linejoin: round; }
svg .flag { stroke: var(--muted); stroke-dasharray: 3 3; } svg .cross { stroke: var(--ink); stroke-width: 2; }
svg .line { stroke-width: 2; } svg .faint { opacity: .3; }
svg circle { stroke: var(--ink); stroke-width: 1.5; } svg .mark { fill: var(--ink); } svg .ring { fill: var(--paper); }
svg .dot { fill: var(--hue); stroke: none; }
svg .hue1 { stroke-dasharray: 7 3; } svg .hue2 { stroke-dasharray: 2 3; } svg .hue3 { stroke-dasharray: 9 3 2 3; }
@media (max-width: 34rem) {
  svg text { font-size: 16px; } th, td { padding-right: .9rem; }
  th:first-child, td:first-child { min-width: 6.5rem; position: sticky; left: 0; background: var(--paper); } }
.samples { columns: 24rem 2; column-gap: 3.5rem; }
.sample { break-inside: avoid; padding: 1rem 0; border-top: 1px solid var(--rule); font-family: var(--read); }
.sample p { margin: 0; white-space: pre-wrap; tab-size: 4; max-height: 24rem; overflow: auto; background:
  linear-gradient(to top, var(--paper) 50%, transparent) bottom / 100% 3rem no-repeat local,
  linear-gradient(to top, var(--shade), transparent) bottom / 100% 1rem no-repeat scroll; }
.sample .asked { color: var(--accent); font: 500 .9375rem/1.6 var(--text); margin-bottom: .5rem; }
.sample small { display: block; font-family: var(--text); margin-top: .5rem; }
"""
