"""Pieces of the page: cards, charts at two widths, tables, figures. Text that they are given is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from kvpilot.simulate.report.figures import HALF, NARROW, Chart


def card(title: str, note: str, body: str) -> str:
    """A section; `body` is HTML already."""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="card"><h2>{escape(title)}</h2>{said}{body}</section>'


def titled(chart: Chart, width: float = HALF) -> str:
    """A chart at this width, and another drawing of it for narrow screens."""
    return (
        f'<figure><h3>{escape(chart.title)}</h3><div class="wide">{chart.at(width).inline}</div>'
        f'<div class="narrow">{chart.at(NARROW).inline}</div></figure>'
    )


def table(head: Sequence[str], body: Iterable[str]) -> str:
    """Of rows and cells that are HTML already."""
    top = f"<thead><tr>{''.join(head)}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{"".join(body)}</tbody></table></div>'


def row(name: str, cells: Iterable[str], kind: str = "") -> str:
    """One row of a table, of text."""
    said = "".join(f"<td>{escape(each)}</td>" for each in cells)
    return f'<tr class="{kind}"><td class="text">{escape(name)}</td>{said}</tr>'


def cell(value: float | int | None, kind: str) -> str:
    """A figure: a `time` in seconds, a `share`, or a `count`; what is missing is a dash."""
    if value is None:
        return "-"
    if kind == "time":
        return time(value)
    if kind == "share":
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def time(value_s: float) -> str:
    """Milliseconds below a second."""
    return f"{value_s * 1000:.0f} ms" if value_s < 1 else f"{value_s:.2f} s"


def chosen(value: object) -> str:
    """The value of a setting; queue caps as interactive/batch."""
    if isinstance(value, Mapping):
        return "/".join(str(value[name]) for name in sorted(value, reverse=True)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value}"
