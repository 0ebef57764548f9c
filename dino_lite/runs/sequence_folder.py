"""Folder of a sequence: sequence.json, and a run for each stage; imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dino_lite.errors import UserError
from dino_lite.runs.run import Run, read_json, write_json

STAGE_TITLES = ("stage", "starts from", "learns from", "data", "images", "length")


def stage_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """One stage of sequence.json as text, in the order of STAGE_TITLES."""
    name, student, teacher = entry["name"], entry["student"], entry["teacher"] or "itself"
    return name, student, teacher, entry["data"], f"{entry['images']:,}", entry["length"]


class SequenceFolder:
    """Paths in the folder of a sequence, and access to its sequence.json.

    That file holds the command and its request, the values settled for all stages, and "stages" in
    their order: what each starts from and learns from, its data, the path of its result within its
    folder, whether it is finished, and what was measured after it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "sequence.json"

    def exists(self) -> bool:
        """Whether this is a sequence."""
        return self.file.is_file()

    def read(self) -> dict[str, Any]:
        """Content of sequence.json. Raises UserError if it is damaged."""
        content = read_json(self.file)
        if not isinstance(content.get("stages"), list) or not content["stages"]:
            raise UserError(f"{self.file} lists no stages: it is damaged; restore it.")
        return content

    def write(self, content: dict[str, Any]) -> None:
        """Replace sequence.json atomically."""
        write_json(self.file, content)

    def run(self, stage: str) -> Run:
        """The run of a stage."""
        return Run(self.folder / stage)

    def runs(self) -> list[Run]:
        """The runs of the stages that have begun, in order, each followed by its students'."""
        stages = [self.folder / stage["name"] for stage in self.read()["stages"]]
        below = [[folder, *sorted(folder.glob("*/"))] for folder in stages]
        found = [Run(folder) for each in below for folder in each]
        return [run for run in found if run.config_file.is_file()]

    def finished(self) -> list[dict[str, Any]]:
        """The entries of the finished stages."""
        return [stage for stage in self.read()["stages"] if stage["finished"]]

    def is_finished(self) -> bool:
        """Whether every stage is finished."""
        return len(self.finished()) == len(self.read()["stages"])

    def result(self) -> Path | None:
        """The checkpoint that is the result of the last finished stage, if there is one."""
        done = self.finished()
        return self.folder / done[-1]["name"] / done[-1]["result"] if done else None


def find_sequence(asked: str | None, runs_dir: str | Path) -> SequenceFolder | None:
    """The sequence that the user named: its folder, or its name in `runs_dir`; else None."""
    path = Path(os.path.expandvars(asked or "")).expanduser()
    found = (SequenceFolder(each) for each in (path, Path(runs_dir) / path))
    return next((each for each in found if asked and each.exists()), None)


def title_of(run: Run) -> str:
    """The name of a run; of one in a sequence, the path from that: NAME/01_adapt."""
    above = sequence_above(run)
    return run.folder.name if above is None else str(run.folder.relative_to(above.folder.parent))


def sequence_above(run: Run) -> SequenceFolder | None:
    """The sequence in whose folder `run`, a stage or a student of one, lies; else None."""
    found = map(SequenceFolder, [*run.folder.parents][:2])
    return next((each for each in found if each.exists()), None)
