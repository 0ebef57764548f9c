"""HTML and SVG from calls: what is not markup already is escaped."""

from __future__ import annotations

from html import escape

_EMPTY = ("img", "circle", "line", "path", "rect")  # elements that hold nothing


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element; `class_` is class, `_` in a name is `-`, None and False leave an attribute out.

    Children that are not Markup are escaped, and so is every value.
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
    """Children one after the other."""
    parts = (part if isinstance(part, Markup) else escape(part) for part in children)
    return Markup("".join(parts))


def table(head: list[str], rows: list[list[str]], numeric: int = 1) -> Markup:
    """A table in a box that scrolls; columns from `numeric` on stand right."""

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
    """Terms and what they are; empty ones are left out."""
    told = [tag("div", tag("dt", term), tag("dd", what)) for term, what in pairs if what]
    return tag("dl", *told) if told else Markup()


def folded(title: str, *children: str) -> Markup:
    """What is opened by who wants to see it."""
    return tag("details", tag("summary", title), *children)
