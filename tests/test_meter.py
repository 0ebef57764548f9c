"""Progress of long work: what is shown, where, and when."""

from __future__ import annotations

import io
import re
import sys

import pytest

from dino_lite import meter as module
from dino_lite.meter import meter, metered, named


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for every update."""
    monkeypatch.setattr(module, "LINE_SECONDS", 0)


def test_a_line_has_name_part_done_and_time_left(
    no_pause: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where stderr is not a terminal; the last item may stand for fewer units."""
    with named("untrained"), named("linear"):
        assert list(metered("abc", 2500, "training", "images", 1000)) == ["a", "b", "c"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    left = r"\d+ s left"
    assert re.fullmatch(
        rf" 40 %  untrained · linear · training · 1,000 of 2,500 images · {left}", lines[0]
    )
    assert lines[-1].startswith(
        "100 %  untrained · linear · training · 2,500 of 2,500 images · 0 s"
    )


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines come at intervals."""
    list(metered(range(100), 100, "training", "steps"))
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is removed in the end, and stdout stays clean."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "_BAR_SECONDS", 0)
    with named("knn"), meter(3, "features") as advance:
        advance(2)
    assert "knn · features" in terminal.getvalue()
    assert "/3" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_only_the_outer_of_two_meters_is_shown(
    no_pause: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one without a name is not; after an error the next is."""
    with meter(2, "outer") as advance:
        list(metered(range(5), 5, "inner", "steps"))
        advance(1)
    with pytest.raises(ZeroDivisionError), meter(2, "broken"):
        _ = 1 / 0
    list(metered(range(1), 1, "", "steps"))
    list(metered(range(1), 1, "next", "steps"))
    first, last = capsys.readouterr().out.splitlines()
    assert "outer · 1 of 2" in first
    assert "next · 1 of 1" in last
