"""The report's HTML: one page that needs nothing else, on a phone, on paper, in the dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from bench import drawing

NARROW, WIDE = 326, 860  # px, of a chart; a phone is 360 px wide or more
BREAK = 940  # px of the window, from which on a chart is wide
PNG_DPI = 2 * drawing.DOTS
VARIABLES = {
    colour: f"--c{i}" for i, colour in enumerate((drawing.INK, drawing.FAINT, drawing.GROUND, *drawing.COLOURS))
}

STYLE = """
:root { color-scheme: light dark; @LIGHT@ --line: #c9c9c4; --soft: #f0f0ea; }
@media (prefers-color-scheme: dark) { :root { @DARK@ --line: #4a4a47; --soft: #242422; } }
@media print { :root { @LIGHT@ --line: #c9c9c4; --soft: #ffffff; } }
* { box-sizing: border-box; }
html { font-size: 100%; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(@INK@); background: var(@GROUND@); overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.2; }
h2 { font-size: 1.375rem; margin: 3rem 0 .5rem; padding-top: .75rem; border-top: 2px solid var(@INK@); }
h3 { font-size: 1.125rem; margin: 2rem 0 .5rem; }
p, ul { max-width: 42rem; }
a { color: inherit; }
nav ul { columns: 12rem; padding-left: 1.25rem; }
nav a { display: inline-block; padding: .25rem 0; }
figure { margin: 1rem 0; }
figcaption { max-width: 42rem; margin-top: .5rem; }
.box { overflow-x: auto; }
.box:focus-visible { outline: 2px solid var(@INK@); }
svg { display: block; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.narrow { display: block; } .wide { display: none; }
@media (min-width: @BREAK@px) { .narrow { display: none; } .wide { display: block; } }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .375rem .75rem .375rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); vertical-align: baseline; }
th { font-weight: 600; }
tbody th { white-space: normal; min-width: 7rem; }
thead th { border-bottom: 2px solid var(@INK@); vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; }
mark { color: inherit; background: var(--soft); border: 1px solid var(@INK@); padding: 0 .375rem; }
"""


@dataclass(frozen=True)
class Chart:
    """draw: makes the figure, given its width in CSS pixels. alt: what it shows, for who cannot see it; caption: how to
    read it, for all. name: of its PNG, without the suffix."""

    name: str
    alt: str
    caption: str
    draw: Callable[[int], Figure]


def chart(chart: Chart) -> str:
    """The chart twice, inlined: for phones and for wide windows. Only one of them is shown, and read out."""
    drawn = []
    for kind, width in (("narrow", NARROW), ("wide", WIDE)):
        picture = _svg(chart.draw(width), f"{chart.name}-{kind}", chart.alt)
        drawn.append(box(picture, "chart", kind))
    return f"<figure>{''.join(drawn)}<figcaption>{escape(chart.caption)}</figcaption></figure>"


def png(chart: Chart, folder: Path) -> None:
    with rc_context(drawing.RC):
        figure = chart.draw(WIDE)
        figure.savefig(folder / f"{chart.name}.png", dpi=PNG_DPI, facecolor="white")


def _svg(figure: Figure, name: str, alt: str) -> str:
    """Inline SVG whose colours follow the page's."""
    file = io.StringIO()
    with rc_context(drawing.RC):
        figure.savefig(file, format="svg")
    width, height = (size * drawing.DOTS for size in figure.get_size_inches())
    text = file.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    # a page must not hold an id twice, and what is hidden cannot be referred to
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"\s*\n\s*", "\n", body)
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg {size} role="img" aria-label="{escape(alt)}">{body}</svg>'


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table in a box of its own to scroll in; its caption is only read out, for it stands under a heading. The first
    `texts` columns are text, the others figures; cells are HTML already."""
    kinds = [' class="text"' if i < texts else "" for i in range(len(headings))]
    head = "".join(f'<th scope="col"{kind}>{escape(h)}</th>' for kind, h in zip(kinds, headings, strict=True))
    lines = []
    for cells in rows:
        first, *others = zip(kinds, cells, strict=True)
        line = f'<th scope="row"{first[0]}>{first[1]}</th>' + "".join(f"<td{k}>{c}</td>" for k, c in others)
        lines.append(f"<tr>{line}</tr>")
    inner = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return box(f"<table>{inner}</table>", caption)


def document(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n"
        "</html>\n"
    )


def box(inner: str, label: str, kind: str = "") -> str:
    """What may be wider than the window, and scrolls by itself; from the keyboard too. label: read out for it."""
    name = f"box {kind}".rstrip()
    return f'<div class="{name}" tabindex="0" role="group" aria-label="{escape(label)}">{inner}</div>'


def _style() -> str:
    light = " ".join(f"{variable}: {colour};" for colour, variable in VARIABLES.items())
    dark = " ".join(f"{variable}: {drawing.DARK[colour]};" for colour, variable in VARIABLES.items())
    named = {"INK": VARIABLES[drawing.INK], "GROUND": VARIABLES[drawing.GROUND]}
    text = STYLE
    for name, value in {"LIGHT": light, "DARK": dark, "BREAK": str(BREAK), **named}.items():
        text = text.replace(f"@{name}@", value)
    return text
