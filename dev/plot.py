"""A diagram of the report as an SVG file of its own, for programs that draw one."""

from nanochat.report_page import HEIGHT, LEFT, WIDTH, Curve, shown, svg

# In a page it is that of report.html.
STYLE = """
text { font: 11px sans-serif; fill: #555 } .title { font-weight: bold }
.y { text-anchor: end } .x { text-anchor: middle } path { stroke: #ddd; fill: none } circle { r: 3px; fill: #111 }
.flag { stroke: #555; stroke-dasharray: 3 3 } polyline { fill: none; stroke: #2563eb; stroke-width: 2 }
.faint { opacity: .3 } .hue1 { stroke: #c2410c } .hue2 { stroke: #15803d } .hue3 { stroke: #7e22ce }
.hue4 { stroke: #a16207 } .hue5 { stroke: #0e7490 }
@media (prefers-color-scheme: dark) { text { fill: #bbb } path { stroke: #444 } circle { fill: #ddd } }
"""


def svg_file(curve: Curve) -> str:
    """The diagram with its title and the names of its lines and marks, as a file of its own."""
    names = ", ".join(series.name for series in curve.series if series.name)
    caption = f'<text x="{LEFT}" y="{HEIGHT + 12}">{shown(names)}</text>'
    drawn = svg(curve).replace("</svg>", f"{caption}<style>{STYLE}</style></svg>")
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -18 {WIDTH} {HEIGHT + 36}" '
    title = f'<text y="-4" class="title">{shown(curve.title)}</text>'
    return drawn.replace(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" ', frame, 1).replace(">", f">{title}", 1) + "\n"
