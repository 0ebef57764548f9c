"""Folder of a run: paths, lock, and JSON files written atomically."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: no lock, so two processes may train the same run
    fcntl = None  # type: ignore[assignment]

from dino_lite.data.names import file_name
from dino_lite.data.plain_json import read_object
from dino_lite.errors import UserError


class Run:
    """Paths in the folder of a run, and access to its lock and results.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "config.yaml"
        self.environment_file = folder / "environment.json"
        self.results_file = folder / "results.json"
        self.bad_files = folder / "bad_files.csv"  # path, reason
        self.checkpoints = folder / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        # Of an adaptation, whose result lies between start and end: see runs/promise.py.
        self.start, self.adapted = (self.checkpoints / f"{n}.ckpt" for n in ("start", "adapted"))
        self.path_picture = folder / "path.png"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.folder == other.folder

    def __hash__(self) -> int:
        return hash(self.folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process. The lock is released when the process exits, even on a
        crash. Raises UserError if another process holds it.
        """
        why = "is being trained by another process: wait for it, or choose another name=."
        with locked(self.folder, why):
            yield

    def is_locked(self) -> bool:
        """Whether a process trains the run now; False where there are no locks."""
        try:
            with open(self.folder / ".lock") as lock:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no lock yet, or not readable
            return False
        return False

    def results(self) -> dict[str, Any]:
        """Content of results.json, empty if there is none yet."""
        return read_json(self.results_file) if self.results_file.is_file() else {}

    def is_trained(self) -> bool:
        """Whether training is complete; a finished run also has its pictures and baselines."""
        results = self.results()
        return bool(results.get("trained") or results.get("finished"))

    def clear(self, pictures: Iterable[str]) -> None:
        """Remove results and `pictures` of an earlier training in this folder."""
        drawn = (self.folder / f"{name}.png" for name in pictures)
        for path in (self.results_file, self.start, self.adapted, self.path_picture, *drawn):
            path.unlink(missing_ok=True)

    def add_results(self, results: dict[str, Any]) -> None:
        """Merge `results` into results.json."""
        merge_json(self.results_file, lambda before: before | results)

    def unreadable(self) -> list[list[str]]:
        """Path and reason of the images that could not be read."""
        if not self.bad_files.is_file():
            return []
        with self.bad_files.open(newline="", encoding="utf-8", errors="replace") as file:
            return [row for row in csv.reader(file) if row][1:]

    def add_warnings(self, warnings: list[dict[str, Any]]) -> None:
        """Store the latest warning of each kind under "warnings" in results.json."""

        def merged(before: dict[str, Any]) -> dict[str, Any]:
            by_kind = {w["kind"]: w for w in [*before.get("warnings", []), *warnings]}
            return before | {"warnings": list(by_kind.values())}

        if warnings:
            merge_json(self.results_file, merged)


@contextmanager
def locked(folder: Path, why: str) -> Iterator[None]:
    """Lock `folder`, made if it is missing, for this process. Raises UserError if another process
    holds it: the folder, then `why`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} {why}") from error
        yield


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` atomically as JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically as UTF-8; characters that cannot be encoded become "?"."""
    # Other processes may write too.
    partial = path.with_name(file_name(f".{path.name}", f".{os.getpid()}.part"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def merge_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the content of a file by `change(content)`, where the content of a missing file is
    {}. Locked: concurrent processes wait for each other.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(file_name(f".{path.name}", ".lock")), "w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            write_json(path, change(read_json(path) if path.is_file() else {}))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a file written by `write_json`."""
    return read_object(path)
