"""Folder of a sequence: sequence.json, and a run for each stage; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dino_lite.errors import UserError
from dino_lite.runs.run import Run, read_json, write_json


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
        """The runs of the stages that have begun, in order."""
        named = [self.run(stage["name"]) for stage in self.read()["stages"]]
        return [run for run in named if run.config_file.is_file()]

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


def title_of(run: Run) -> str:
    """The name of a run; of one in a sequence, the path from that: NAME/01_adapt."""
    above = next((p for p in run.folder.parents[:2] if SequenceFolder(p).exists()), None)
    return run.folder.name if above is None else str(run.folder.relative_to(above.parent))
