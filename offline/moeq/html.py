"""Self-contained pages: one file, no network, light and dark, wide and narrow."""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #222; --back: #fff; --line: #ddd; --soft: #667; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --back: #16181c; --line: #3a3f47; --soft: #9aa3b2; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: var(--text); background: var(--back); overflow-wrap: break-word; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .2em .7em; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
tr.best td { font-weight: 600; }
.wide { overflow-x: auto; }
.soft { color: var(--soft); }
.paper { background: #fff; border-radius: 6px; padding: .3em; margin: .5em 0; overflow-x: auto; }
.paper svg { display: block; max-width: 100%; height: auto; min-width: 36em; }
@media (max-width: 600px) {
  body { margin: 1em auto; font-size: 15px; }
  th, td { padding: .2em .4em; }
}
"""


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """Return a whole page.

    Args:
        title: Plain text.
        body: HTML.
        style: More CSS.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "</body></html>\n"
    )


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], best: Iterable[int] = (), text: int = 1
) -> str:
    """Return a table of plain text, which scrolls by itself where the screen is narrow.

    Args:
        header: Names of the columns.
        rows: Cells.
        best: Numbers of rows to stress.
        text: Columns, from the first, that are text and not numbers.
    """
    marked = set(best)

    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if number < text else ''}>{escape(value)}</{tag}>"
            for number, value in enumerate(values)
        )

    lines = [f"<tr>{cells(header, 'th')}</tr>"] if header else []
    lines += [
        f"<tr{' class=best' if number in marked else ''}>{cells(row, 'td')}</tr>"
        for number, row in enumerate(rows)
    ]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"
