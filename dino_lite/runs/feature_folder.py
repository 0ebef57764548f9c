"""Folder that `dino-lite embed` writes: parts, meta.json and the list of unreadable images."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dino_lite.config import differences
from dino_lite.contracts import UserError
from dino_lite.distributed import all_gather_objects, rank
from dino_lite.eval.feature_files import SUFFIXES, FileFormat, Part, Table, atomically, write_table
from dino_lite.runs.run import locked, read_json
from dino_lite.settings.validate import shown

FORMAT = "dino_lite features 1"
_MAY_DIFFER = ("version", "checkpoint", "data", "finished")  # if the rest is the same
_AGAIN = "give another out=, or remove that folder to begin again."

Bad = list[tuple[str, str]]  # name of an image and why it could not be read


class FeatureFolder:
    """A file for each part, or for .npy a folder of arrays; meta.json, plain JSON, says what they
    hold.

    A part that exists is complete. The images of a part that could not be read are listed in
    .bad/PART.csv, and at the end those of all parts in bad_files.csv.
    """

    def __init__(self, folder: Path, form: FileFormat) -> None:
        self.folder, self.form = folder, form
        self.meta = folder / "meta.json"

    @contextmanager
    def begun(self, about: dict[str, Any]) -> Iterator[None]:
        """Context in which the folder, locked by the first rank, gets the features `about`. Raises
        UserError on all ranks if it holds others, or is locked.
        """
        why = "is being written by another command: wait for it, or choose another out=."
        problem = None
        with ExitStack() as stack:
            if rank() == 0:
                try:
                    stack.enter_context(locked(self.folder, why))
                    self._begin(about)
                except UserError as error:
                    problem = str(error)
                except OSError as error:
                    is_file = self.folder.exists() and not self.folder.is_dir()
                    told = "it is a file; name a folder" if is_file else error.strerror
                    problem = f"Cannot write to out={self.folder}: {told}."
            if told := all_gather_objects(problem)[0]:
                raise UserError(told)
            yield

    def _begin(self, about: dict[str, Any]) -> None:
        """Write meta.json, or check that the one there says the same."""
        if self.meta.is_file():
            _check_same(self.folder, read_json(self.meta), about)
        elif any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise UserError(f"out={self.folder} holds other files: name a new folder.")
        else:
            self._write_meta(about)

    def path(self, part: Part) -> Path:
        """Where the features of `part` are."""
        return self.folder / f"{part.title}{SUFFIXES[self.form]}"

    def missing(self, parts: Sequence[Part]) -> list[Part]:
        """The parts that have yet to be written, as the first rank sees them."""
        own = [i for i, part in enumerate(parts) if not rank() and not self.path(part).exists()]
        return [parts[i] for i in all_gather_objects(own)[0]]

    def write(self, part: Part, table: Table, bad: Bad) -> None:
        """Write a part, its unreadable images first."""
        listed = self._bad_file(part)
        if bad:
            atomically(listed, lambda path: _write_csv(path, bad))
        else:
            listed.unlink(missing_ok=True)
        write_table(table, self.path(part), self.form)

    def finish(self, about: dict[str, Any], parts: Sequence[Part]) -> int:
        """Write bad_files.csv, if there are any, and the final meta.json with their number; returns
        it.
        """
        found = {part: self._bad(part) for part in parts}
        bad = [row for rows in found.values() for row in rows]
        if bad:
            atomically(self.folder / "bad_files.csv", lambda path: _write_csv(path, bad))
        counts = {
            split: sum(len(found[p]) for p in parts if p.split == split)
            for split in about["splits"]
        }
        splits = {
            split: told | {"unreadable": counts[split]} for split, told in about["splits"].items()
        }
        self._write_meta(about | {"splits": splits, "finished": True})
        return len(bad)

    def _bad(self, part: Part) -> Bad:
        listed = self._bad_file(part)
        if not listed.is_file():
            return []
        with listed.open(newline="", encoding="utf-8") as file:
            return [(name, why) for name, why in list(csv.reader(file))[1:]]

    def _bad_file(self, part: Part) -> Path:
        return self.folder / ".bad" / f"{part.title}.csv"

    def _write_meta(self, about: dict[str, Any]) -> None:
        text = json.dumps(about, indent=2) + "\n"
        atomically(self.meta, lambda path: path.write_text(text, encoding="utf-8"))


def _write_csv(path: Path, bad: Bad) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "reason"])
        writer.writerows(bad)


def _check_same(folder: Path, before: dict[str, Any], about: dict[str, Any]) -> None:
    """Raise UserError if the features that `before` describes differ from those of `about`."""
    if before.get("format") != FORMAT:
        raise UserError(f"{folder / 'meta.json'} is not of this version of dino-lite: {_AGAIN}")
    about = json.loads(json.dumps(about))  # tuples become lists
    told = [key for key in differences(before, about) if not key.endswith(".unreadable")]
    changed = {key.partition(".")[0] for key in told} - {*_MAY_DIFFER}
    for key in about:  # the first one: others may follow from it
        if key not in changed:
            continue
        if key == "weights":
            why = f"of other weights (checkpoint={before.get('checkpoint')})"
        elif key == "splits":
            why = f"of other data ({before.get('data')}), or its files or labels have changed"
        elif key == "features":
            why = f"{', '.join(before.get(key) or {})}, not {', '.join(about[key])}"
        elif isinstance(about[key], dict):
            old, new = before.get(key) or {}, about[key]
            other = [
                f"{name}={shown(old.get(name))}, not {shown(new[name])}"
                for name in new
                if old.get(name) != new[name]
            ]
            why = f"of {key} {', '.join(other)}"
        else:
            why = f"with {key}={shown(before.get(key))}, not {shown(about[key])}"
        raise UserError(f"{folder} holds features {why}: {_AGAIN}")
