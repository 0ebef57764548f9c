"""Shows how far a long piece of work is: a bar in a terminal, otherwise a line at intervals."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

from dino_lite.distributed import rank

LINE_SECONDS = 10  # between lines if stderr is not a terminal
_BAR_SECONDS = 1  # before a bar is drawn: shorter work needs none

T = TypeVar("T")
_names: ContextVar[tuple[str, ...]] = ContextVar("names", default=())
_open: ContextVar[bool] = ContextVar("open", default=False)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Context in which `name` precedes the titles of meters."""
    before = _names.get()
    _names.set((*before, name))
    try:
        yield
    finally:
        _names.set(before)


@contextmanager
def meter(total: int, what: str, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Show the progress of `what` over `total` units, and the time left; yields a function that
    counts further units.

    Only on rank 0. A meter within another one shows nothing, nor does one without a name.
    """
    within = _open.get()
    _open.set(True)
    title = " · ".join([*_names.get(), what])
    try:
        if within or rank() or not what:
            yield lambda num: None
        elif sys.stderr.isatty():
            with tqdm(
                total=total,
                desc=title,
                unit=f" {unit}",
                dynamic_ncols=True,
                leave=False,
                delay=_BAR_SECONDS,
            ) as bar:
                yield lambda num: bar.update(num) and None
        else:
            yield _lines(total, title, unit)
    finally:
        _open.set(within)


def metered(items: Iterable[T], total: int, what: str, unit: str, each: int = 1) -> Iterator[T]:
    """`items`, with a meter that counts `each` units per item (the last may have fewer)."""
    with meter(total, what, unit) as advance:
        for i, item in enumerate(items):
            yield item
            advance(min(each, total - i * each))


def duration(seconds: float) -> str:
    """Seconds as text: 42 s, 12 min 5 s, 3 h 7 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{rest} s"


def _lines(total: int, title: str, unit: str) -> Callable[[int], None]:
    """Counts units, and writes a line to stdout every `LINE_SECONDS`."""
    done, started = 0, time.monotonic()
    shown = started

    def advance(num: int) -> None:
        nonlocal done, shown
        done, now = done + num, time.monotonic()
        if now - shown >= LINE_SECONDS and done:
            shown = now
            left = duration((now - started) * (total - done) / done)
            part = f"{done:,} of {total:,} {unit}"
            sys.stdout.write(f"{100 * done / total:3.0f} %  {title} · {part} · {left} left\n")
            sys.stdout.flush()

    return advance
