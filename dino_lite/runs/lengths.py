"""Finds an earlier run that differs from a new one in its length only."""

from __future__ import annotations

from typing import Any

from dino_lite.config import Config
from dino_lite.contracts import UserError
from dino_lite.runs.identity import changed_from_defaults
from dino_lite.runs.old_names import current
from dino_lite.runs.run import Run, read_json

_LENGTH = "trainer.max_"


def other_length(run: Run, request: Config) -> str | None:
    """Say that `run` is another run than the latest one of the same settings with another length,
    and what can be done instead; None if there is none. Reads one small file of each run.
    """
    chosen = changed_from_defaults(request)
    found: list[tuple[float, Run, str]] = []
    for file in run.folder.parent.glob("*/environment.json"):
        other = Run(file.parent)
        try:
            before = current(dict(read_json(file)["request"]))
            saved = other.last.stat().st_mtime
        except (UserError, OSError, KeyError, TypeError, ValueError):  # damaged, or no checkpoint
            continue
        different = {
            key
            for key in before.keys() | request.keys()
            if before.get(key) != request.get(key) and (key in before or key in chosen)
        }
        if other != run and different and all(key.startswith(_LENGTH) for key in different):
            found.append((saved, other, _length(before, different)))
    if not found:
        return None
    _, other, length = max(found, key=lambda each: each[0])
    return (
        f"This begins another run than {other.folder}, whose settings are the same except for "
        f"{length}: schedules depend on the length, so no run can be prolonged. To begin from its "
        f"weights instead of fresh ones, add checkpoint={other.folder}."
    )


def _length(request: dict[str, Any], keys: set[str]) -> str:
    given = [
        f"{key}={request[key]}" for key in sorted(keys) if request.get(key) not in (None, "auto")
    ]
    return " ".join(given) or "its automatic length"
