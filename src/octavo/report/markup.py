"""Building blocks of the HTML page; everything from data is escaped here."""

import html
from collections.abc import Iterable, Sequence

from octavo.report.text import plain

NEWLINE = "\n"


class Safe(str):
    """HTML that is already escaped; any other string is escaped when added to the page."""


def safe(value: object) -> Safe:
    """Return ``value`` as HTML, escaped unless it is :class:`Safe`."""
    return value if isinstance(value, Safe) else Safe(html.escape(plain(value, 4000)))


def join(*parts: object) -> Safe:
    """Return the parts as one piece of HTML."""
    return Safe("".join(safe(part) for part in parts))


def dotted(name: object) -> Safe:
    """Return the name of a site as code that may be broken after its dots."""
    return Safe(f"<code>{safe(plain(name)).replace('.', '.<wbr>')}</code>")


def paragraph(*parts: object, kind: str = "") -> Safe:
    """Return a paragraph of the CSS class ``kind``."""
    return Safe(f'<p class="{kind}">{join(*parts)}</p>' if kind else f"<p>{join(*parts)}</p>")


def items(parts: Iterable[object], kind: str = "") -> Safe:
    """Return a list."""
    return Safe(f'<ul class="{kind}">{"".join(f"<li>{safe(part)}</li>" for part in parts)}</ul>')


def grid(headers: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> Safe:
    """Return a table whose first column names the row.

    With the kind ``"stack"``, each row becomes a small card on narrow pages, so every cell has the name of its column.
    """
    head = "".join(f'<th scope="col">{safe(header)}</th>' for header in headers)
    body = []
    for first, *rest in rows:
        labels = [f' data-label="{safe(h)}"' if kind == "stack" else "" for h in headers[1:]]
        cells = "".join(f"<td{label}>{safe(cell)}</td>" for label, cell in zip(labels, rest, strict=True))
        body.append(f'<tr><th scope="row">{safe(first)}</th>{cells}</tr>')
    table = f"<thead><tr>{head}</tr></thead><tbody>{NEWLINE.join(body)}</tbody>"
    return Safe(f'<div class="scroll"><table class="{kind}">{table}</table></div>')


def bar(share: float, role: str, label: object) -> Safe:
    """Return a bar that fills ``share`` of its width, with its figure next to it."""
    width = 100 * min(1.0, max(0.0, share))
    fill = f'<i style="width:{width:.2f}%;background:var(--{role})"></i>'
    return Safe(f'<div class="bar"><span class="track">{fill}</span><span class="figure">{safe(label)}</span></div>')


def bars(rows: Iterable[tuple[object, Sequence[Safe]]], headers: Sequence[str] = ()) -> Safe:
    """Return a list of names, each with one or more bars."""
    heads = join(*(Safe(f"<span>{safe(header)}</span>") for header in headers))
    head = f'<div class="row heads"><span></span>{heads}</div>' if headers else ""
    body = "\n".join(f'<div class="row"><div class="name">{safe(name)}</div>{join(*pair)}</div>' for name, pair in rows)
    return Safe(f'<div class="bars">{head}{body}</div>')


def folded(summary: str, *parts: object) -> Safe:
    """Return a part of the page that opens on a click."""
    return Safe(f"<details><summary>{safe(summary)}</summary>{join(*parts)}</details>")


def section(name: str, title: str, *parts: object) -> Safe:
    """Return a section of the page with its heading."""
    return Safe(f'<section id="{name}"><h2>{safe(title)}</h2>\n{join(*parts)}</section>')
