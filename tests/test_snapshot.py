"""The Gram teacher: when it is taken, and that a resumed run goes on with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dino_lite.contracts import Progress, UserError
from dino_lite.methods.snapshot import SnapshotTeacher

YES = torch.tensor(True)


def follow(teacher: SnapshotTeacher, steps: range, total: int = 20) -> list[float]:
    """What the teacher holds before each step, where the other one holds the steps it has made."""
    other, held = nn.Linear(1, 1, bias=False), []
    for step in steps:
        at = Progress(step, total, 5)
        held.append(float(teacher.module.weight) if teacher.is_on(at) else -1.0)
        nn.init.constant_(other.weight, step + 1.0)
        teacher.after_step(other, at, YES)
    return held


def snapshot(start: Any, every: Any = None, most: int = 1) -> SnapshotTeacher:
    """Of a network that holds 0."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    return SnapshotTeacher(network, start, every, most)


@pytest.mark.parametrize("start", ["4 steps", 0.2])
def test_it_is_off_and_then_what_the_other_was(start: Any) -> None:
    """Before step 4 it says nothing; from then on it is the teacher after four steps."""
    assert follow(snapshot(start), range(8)) == [-1.0] * 4 + [4.0] * 4


def test_it_is_taken_anew_on_schedule_and_no_oftener_than_allowed() -> None:
    """At steps 4, 7 and 10, and not at 13."""
    held = follow(snapshot("4 steps", "3 steps", 3), range(16))
    assert held == [-1.0] * 4 + [4.0] * 3 + [7.0] * 3 + [10.0] * 6


def test_from_the_start_on_it_is_what_the_run_began_with() -> None:
    """Which is what high-resolution adaptation anchors to."""
    assert follow(snapshot(0), range(4)) == [0.0] * 4
    assert follow(snapshot("0 steps", "3 steps", 2), range(5)) == [0.0] * 3 + [3.0] * 2


@pytest.mark.parametrize("stop", range(1, 13))
def test_a_resumed_run_has_the_same_teacher(stop: int) -> None:
    """Wherever it stopped."""
    whole = follow(snapshot("4 steps", "3 steps", 3), range(14))
    first = snapshot("4 steps", "3 steps", 3)
    begun = follow(first, range(stop))
    second = snapshot("4 steps", "3 steps", 3)
    second.load_state_dict(first.state_dict())
    assert begun + follow(second, range(stop, 14)) == whole


def test_loading_weights_is_noticed_after_it_has_looked() -> None:
    """A count kept on the host follows the one in the weights."""
    old, new = snapshot("2 steps", "2 steps", 9), snapshot("2 steps", "2 steps", 9)
    follow(old, range(8))
    follow(new, range(3))
    new.load_state_dict(old.state_dict())
    assert follow(new, range(8, 11)) == [8.0, 8.0, 10.0]


def test_without_a_start_it_is_not_used() -> None:
    """One switch."""
    teacher = snapshot(None)
    assert not teacher.is_used
    assert follow(teacher, range(4)) == [-1.0] * 4


def test_what_cannot_be_is_refused() -> None:
    """In a sentence that names the key."""
    with pytest.raises(UserError, match=r"start_step=3"):
        snapshot(3)
    with pytest.raises(UserError, match=r"most=0"):
        snapshot(0.5, most=0)
