"""Builds HTML and SVG by function calls; text that is not Markup is escaped."""

from __future__ import annotations

from html import escape

_EMPTY = ("img", "circle", "line", "path", "rect")  # elements without content


class Markup(str):
    """A string of HTML, which is not escaped."""


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element. `class_` gives class, `_` in a name becomes `-`; attributes that are None or
    False are omitted.

    Children that are not Markup are escaped, and so are all values.
    """
    written = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            title = key.strip("_").replace("_", "-")
            text = "" if value is True else str(value)
            written.append(f'{title}="{escape(text)}"')
    start = " ".join(written)
    if name in _EMPTY:
        return Markup(f"<{start}/>")
    return Markup(f"<{start}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Concatenate children."""
    parts = (part if isinstance(part, Markup) else escape(part) for part in children)
    return Markup("".join(parts))


def table(head: list[str], rows: list[list[str]], numeric: int = 1) -> Markup:
    """A table in a scrollable box; columns from index `numeric` are right-aligned."""

    def cells(name: str, row: list[str]) -> Markup:
        return tag(
            "tr",
            *(
                tag(name, cell, class_="number" if place >= numeric else None)
                for place, cell in enumerate(row)
            ),
        )

    body = tag("tbody", *(cells("td", row) for row in rows))
    return tag(
        "div",
        tag("table", tag("thead", cells("th", head)), body),
        class_="scroll",
        tabindex=0,
    )


def listing(pairs: list[tuple[str, str]]) -> Markup:
    """A description list of (term, text) pairs; empty texts are omitted."""
    told = [tag("div", tag("dt", term), tag("dd", what)) for term, what in pairs if what]
    return tag("dl", *told) if told else Markup()


def folded(title: str, *children: str) -> Markup:
    """A collapsed section."""
    return tag("details", tag("summary", title), *children)
