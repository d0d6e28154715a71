"""How a report looks: its Markdown, for terminals and repositories, and the page for people that is made from it.

Promises: whatever a model, a user or a file name put into a text is shown and never interpreted, in both; of a text
longer than LONGEST the beginning is shown and its length is said. The page is one file without scripts that loads
nothing; report.html is its frame and style. Knows nothing of records or stages.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple, TypeVar

from markdown_it import MarkdownIt

T = TypeVar("T")
SPARKS = "▁▂▃▄▅▆▇█"
KEYS = {"mark": "●", "ring": "○", "cross": "×", "flag": "┆", "dot": "•"}  # what stands for marks in a legend
DRAWN = 400  # points of a line in a diagram; more are thinned evenly
LONGEST = 8000  # characters of a text; a model that repeats itself writes megabytes
HUES = 6  # lines that can be told apart in one diagram
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 268, 52, 16, 28, 42  # of a diagram and its margins, in its own units
# Control characters show as their pictures: a terminal would obey them, and HTML has no NUL. Marks that turn the
# direction of what follows, and separators that some programs take for line ends, show as their numbers.
TURNING = (0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
VISIBLE: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
VISIBLE |= dict.fromkeys(range(127, 160), 0xFFFD) | {code: f"<U+{code:04X}>" for code in TURNING}
# Tags of ours in the rendered Markdown, where a text can't have any, and what the page has in their place.
FORMS = {
    "<table>": '<div class="scroll" tabindex="0"><table>',
    "</table>": "</table></div>",
    ' style="text-align:right"': ' class="r"',
    "</strong>: ": "</strong> ",
    "<h4>": "<details><summary>",
    "</h4>": "</summary>",
}


class Series(NamedTuple):
    """At least one point (x, y): a line, a faint line, filled or hollow marks, crosses, dots, or upright lines at x."""

    name: str  # for the legend; "" = not in it
    look: Literal["line", "faint", "mark", "ring", "cross", "flag", "dot"]
    points: Sequence[tuple[float, float]]
    hue: int = 0  # which of the HUES


class Curve(NamedTuple):
    """A small diagram. As text, every line of it is a sparkline."""

    title: str
    unit: str  # of the vertical axis
    series: Sequence[Series]
    x: str = "step"  # what the horizontal axis counts


def to_markdown(title: str, subtitle: str, sections: Iterable[tuple[str, Iterable[str]]]) -> str:
    """The report as Markdown. A section is a title and its blocks; one without blocks is left out. The subtitle begins
    with a word of ours: a number or a dash there would begin a list.
    """
    parts = [f"# {marked(title)}", marked(subtitle)]
    for head, blocks in sections:
        blocks = [block for block in blocks if block]
        parts += [f"## {marked(head)}" if head else "", *blocks] if blocks else []
    return "\n\n".join(part for part in parts if part) + "\n"


def visible(text: str) -> str:
    """The text, or the beginning of a long one, without halves of surrogate pairs, which no file can hold."""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} … [{LONGEST:,} of {len(text):,} characters]"
    return text.replace("\r\n", "\n").encode("utf-8", "replace").decode().translate(VISIBLE)


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(visible(text).split())


def marked(text: str) -> str:
    """The text as Markdown that shows it, in one line. An underscore inside a word needs no mark."""
    return re.sub(r"([\\`*~#<|\[\]]|&(?=#?\w)|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_line(text))


def code(text: str) -> str:
    """The text as code in a cell of a table, where | must be escaped even in code."""
    text = one_line(text).replace("|", r"\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else text and f"`{text}`"


def fenced(kind: str, text: str) -> str:
    """The text as a block of code, where nothing is interpreted; the page gives each kind its look."""
    text = visible(text)
    fence = "`" * max(3, *(1 + len(ticks) for ticks in re.findall("`+", text)), 0)
    return f"{fence}{kind}\n{text}\n{fence}"


def facts(rows: Iterable[Sequence[str]]) -> str:
    """Names and what they are, and perhaps a note beside it."""
    lines = [(f"- **{marked(name)}**: {marked(text)}", *notes) for name, text, *notes in rows]
    return "\n".join(line + "".join(f" *{marked(note)}*" for note in notes if note) for line, *notes in lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kinds: str) -> str:
    """Cells are text; one letter per column says how it is set: l left, r right, c as code."""
    rule = ["---:" if kind == "r" else "---" for kind in kinds]
    body = [[code(c) if kind == "c" else marked(c) for c, kind in zip(row, kinds, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [[*map(marked, head)], rule, *body])


def sample(prompt: str, text: str, is_chat: bool = True, verdict: str = "") -> str:
    """What a model wrote, for a list of samples: the answer to a question, or the continuation of a prompt."""
    asked, written = ("question", "answer") if is_chat else ("prompt", "text")
    return "- " + f"{fenced(asked, prompt)}\n{fenced(written, text)}\n{marked(verdict)}".rstrip().replace("\n", "\n  ")


def folded(title: str, text: str) -> str:
    """Text as it is, which the page shows on request."""
    return f"#### {marked(title)}\n\n{fenced('folded', text)}"


def curves(items: Iterable[Curve]) -> str:
    """The place where the page draws the diagrams, and what they show in words and sparklines."""
    return fenced("curves", "\n\n".join(map(in_words, items)))


def in_words(curve: Curve) -> str:
    """Where each line begins and ends, and a sparkline of it."""
    lines = [f"{curve.title}, {curve.unit}"]
    for series in [series for series in curve.series if series.look == "line"]:
        lines += [f"{one_line(series.name)}: {course(series)}", sparkline([y for _, y in series.points])]
    return "\n".join(lines)


def course(series: Series) -> str:
    return " → ".join(f"{y:.4g}" for _, y in thinned(series.points, 2))


def thinned(values: Sequence[T], limit: int) -> Sequence[T]:
    """At most `limit` of the values, evenly spaced, with the first and the last."""
    few = len(values) <= limit
    return values if few else [values[i * (len(values) - 1) // (limit - 1)] for i in range(limit)]


def sparkline(values: Sequence[float], width: int = 72) -> str:
    """A curve in one line of text, from the lowest value to the highest."""
    picked = thinned(values, width)
    low, high = min(picked), max(picked)
    return "".join(SPARKS[round((value - low) / ((high - low) or 1) * (len(SPARKS) - 1))] for value in picked)


def rounded(x: float, decimals: int = 0) -> str:
    """A number, a large one to three digits: 800, 3.34 M, 1.88 B, 1.19e14."""
    if x >= 1e12:
        return re.sub(r"e\+0*", "e", f"{x:.3g}")
    if x >= 1e6:
        return f"{x / 1e6:.3g} M" if x < 1e9 else f"{x / 1e9:.3g} B"
    return f"{x:,.{decimals}f}"


def to_html(markdown: str, drawn: Sequence[Curve]) -> str:
    """The report as one page, from its Markdown, with the diagrams in their place."""

    def block(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        kind, text = tokens[index].info, tokens[index].content[:-1]
        if kind == "curves":
            return f'<div class="curves">{"".join(map(figure, drawn))}</div>\n'
        end = "</details>" if kind == "folded" else ""
        return f'<pre class="{html.escape(kind)}" dir="auto">{html.escape(text)}</pre>{end}'

    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    renderer.add_render_rule("fence", block)
    body = str(renderer.render(markdown))
    for tag, form in FORMS.items():
        body = body.replace(tag, form)
    title = body.partition("</h1>")[0].removeprefix("<h1>")
    frame = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return Template(frame).substitute(title=title, body=body)


def shown(text: str) -> str:
    return html.escape(visible(text))


def figure(curve: Curve) -> str:
    """A diagram with its title and legend, where a piece of each line, with its course, or its mark stands for it."""
    legend = ""
    for series in [series for series in curve.series if series.name]:
        line = f'<polyline class="{series.look} hue{series.hue}" points="0,3 28,3"/>'
        key = f'<svg class="key" viewBox="0 0 28 6" aria-hidden="true">{line}</svg>'
        key = f"<i>{KEYS[series.look]}</i>" if series.look in KEYS else key
        ends = f" <b>{course(series)}</b>" if series.look == "line" else ""
        legend += f"<span>{key} {shown(series.name)}{ends}</span>"
    return f"<figure><figcaption>{shown(curve.title)}</figcaption>{svg(curve)}<p>{legend}</p></figure>"


def round_ticks(values: Sequence[float], count: int = 5) -> tuple[list[float], int]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose the values, and the decimals they are written with."""
    low, high = min(values), max(values)
    wanted = ((high - low) or abs(high) or 1.0) / count
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted * (1 - 1e-9))
    first, final = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [i * step for i in range(first, max(final, first + 1) + 1)], decimals


def svg(curve: Curve) -> str:
    """The diagram: rules at round values, what is counted below, lines, then marks that say their value on hover."""
    xs, ys = zip(*[point for series in curve.series for point in series.points], strict=True)
    (x_ticks, x_decimals), (y_ticks, y_decimals) = round_ticks(xs), round_ticks(ys)

    def across(x: float) -> str:
        return f"{LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT):.1f}"

    def down(y: float) -> str:
        return f"{TOP + (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<text x="0" y="12">{shown(curve.unit)}</text>']
    for y in y_ticks:
        parts.append(f'<path d="M{LEFT} {down(y)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{down(y)}" dy="4" class="y">{rounded(y, y_decimals)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{across(x)}" y="{HEIGHT - 24}" class="x">{rounded(x, x_decimals)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" class="y">{shown(curve.x)}</text>')
    for series in sorted(curve.series, key=lambda series: series.look in KEYS):  # marks lie over the lines
        points, look = thinned(series.points, DRAWN), f'class="{series.look} hue{series.hue}"'
        if series.look not in KEYS:
            line = " ".join(f"{across(x)},{down(y)}" for x, y in points)
            parts.append(f'<polyline {look} points="{line}"/>')
            continue
        for x, y in points:
            value = "" if series.look == "flag" else f" {y:.4g}"
            hover = f"<title>{shown(series.name)}{value} at {shown(curve.x)} {rounded(x, x_decimals)}</title>"
            if series.look == "flag":
                parts.append(f'<path {look} d="M{across(x)} {TOP}V{HEIGHT - BOTTOM}">{hover}</path>')
            elif series.look == "cross":
                parts.append(f'<path {look} d="M{across(x)} {down(y)}m-4 -4l8 8m0 -8l-8 8">{hover}</path>')
            else:
                parts.append(f'<circle {look} cx="{across(x)}" cy="{down(y)}">{hover}</circle>')
    label = shown(f"{curve.title}, {curve.unit}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
