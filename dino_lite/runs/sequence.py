"""A sequence: a run made of stages, each an ordinary pretraining run in the sequence's folder.

    sequence = Sequence("adapt", config, source, arguments)
    results = sequence.run([
        Stage("01_adapt", first, student="WEIGHTS", teacher="WEIGHTS", after=measure),
        Stage("02_adapt", second, student="01_adapt", …),
    ])

`config` is the composed configuration of the command, `source` the name of its data and `arguments`
its command line. Each stage has a configuration of pretrain; where it starts from the result of an
earlier one, it names `sequence.result_of("01_adapt")`, a file that this stage will write. Keys of
SETTLED that are "auto" get the values of the first stage's plan in all stages. `after(run)` does
what follows the training of a stage, such as measuring it and writing its result, on the first rank
alone, and is called again if it was interrupted; what it returns is kept in sequence.json.
`before(run, config)` is called there with the planned configuration, before the first step.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from dino_lite.config import Config, get, leaves, put
from dino_lite.contracts import Interrupted, Splits
from dino_lite.distributed import alone, is_distributed, rank, srun_tasks
from dino_lite.interrupts import by_signal, number_of
from dino_lite.machine import pick_accelerator
from dino_lite.overrides import outside_hydra
from dino_lite.planning.checks import check_values
from dino_lite.planning.overview import length
from dino_lite.planning.plan import gather_facts, open_splits, plan
from dino_lite.runs.begin import begin_config
from dino_lite.runs.identity import absolute_paths, requested, sequence_name
from dino_lite.runs.pretraining import run_pretrain, say
from dino_lite.runs.resume import check_request
from dino_lite.runs.run import Run, locked
from dino_lite.runs.sequence_folder import STAGE_TITLES, SequenceFolder, stage_cells
from dino_lite.runs.trainer import as_command, join_ranks
from dino_lite.wording import aligned

Tell = Callable[[Callable[[], Any]], Any]

LAST = "checkpoints/last.ckpt"
SETTLED = (
    "preset",
    "augment.global_size",
    "augment.local_size",
    "normalize.mean",
    "normalize.std",
    "trainer.max_time",
    "trainer.max_epochs",
    "trainer.max_steps",
)


class Stage(NamedTuple):
    """A stage: a pretraining run, and what follows it.

    `student` says what it starts from, `teacher` what it learns from, for the table. `result` is
    the checkpoint, within the stage's folder, that the sequence's name opens once it is finished.
    """

    name: str  # of its folder: 01_adapt
    config: Config  # of pretrain
    student: str
    teacher: str = ""
    result: str = LAST
    after: Callable[[Run], dict[str, Any] | None] | None = None
    before: Callable[[Run, Config], None] | None = None


class Sequence:
    """The sequence that a command's configuration asks for; nothing is written before `run`."""

    def __init__(
        self, command: str, config: Config, source: str, arguments: list[str] | None = None
    ) -> None:
        self.command, self.config, self.arguments = command, config, arguments or []
        self.request = requested(config)
        name = sequence_name(command, config, self.request, source)
        self.at = SequenceFolder(Path(config["runs_dir"]).expanduser() / name)

    @property
    def folder(self) -> Path:
        """The folder of the sequence."""
        return self.at.folder

    def result_of(self, stage: str, result: str = LAST) -> str:
        """The path that a stage of that name has its result in, once it is finished."""
        return str((self.folder / stage / result).absolute())

    def run(self, stages: list[Stage]) -> dict[str, Any]:
        """Run the stages that are not finished. Returns the folder as "run", the path of the result
        and what was measured after each stage; nothing on other ranks than the first.

        Raises UserError if the sequence of this name was started otherwise, and Interrupted after
        a signal.
        """
        if _is_spawned():  # by Lightning, for the stage that is being trained
            current = next(stage for stage in stages if not self._run_of(stage).is_trained())
            self._train(current, self.at.read()["settled"])
            return {}
        join_ranks(pick_accelerator(get(self.config, "trainer.accelerator"), "trainer.accelerator"))
        tell = _telling()
        with self._interruptible():
            known = tell(functools.partial(self._known, stages))
            with self._locked() if rank() == 0 else nullcontext():
                self._run(stages, known, tell)
        if rank() != 0:
            return {}
        found = {stage["name"]: stage["results"] for stage in self.at.read()["stages"]}
        return {"run": str(self.folder), "result": str(self.at.result()), "stages": found}

    def _run(self, stages: list[Stage], known: dict[str, Any], tell: Tell) -> None:
        done = sum(stage["finished"] for stage in known["stages"])
        if rank() == 0 and not self.at.exists():
            self.at.write(known)
        if done == len(stages):
            where = f"dino-lite evaluate checkpoint={self.folder} evaluates its result"
            say(f"{self.folder} is finished; {where}")
            return
        say(f"{'resuming' if (self.folder / stages[0].name).is_dir() else 'run'} {self.folder}")
        say(stage_table(known["stages"]) + "\n")
        for stage in stages[done:]:
            trained = tell(self._run_of(stage).is_trained)
            if rank() == 0 or not trained:
                self._train(stage, known["settled"])
            tell(functools.partial(self._finish, stage))
        say(f"dino-lite report checkpoint={self.folder} shows all stages on one page")

    def _known(self, stages: list[Stage]) -> dict[str, Any]:
        """The content of sequence.json, which is not written here: of the earlier command, or new.
        Raises UserError if the earlier command was another.
        """
        if not self.at.exists():
            return self._new(stages)
        known = self.at.read()
        about = {"overrides": known["overrides"]}
        run = Run(self.folder)
        check_request(run, known["request"], self.request, about, self.config, self.command)
        return known

    def _new(self, stages: list[Stage]) -> dict[str, Any]:
        checked = [check_values(absolute_paths(stage.config)) for stage in stages]
        opened: dict[str, Splits] = {}
        for config in checked:
            if (key := str(config["data"])) not in opened:
                opened[key] = open_splits(config["data"])
        splits = [opened[str(config["data"])] for config in checked]
        settled = settle(checked[0], splits[0])
        entries = [
            {
                "name": stage.name,
                "student": stage.student,
                "teacher": stage.teacher,
                "data": data.name,
                "images": len(data.train),
                "length": length(with_settled(config, settled)),
                "result": stage.result,
                "finished": False,
                "results": {},
            }
            for stage, config, data in zip(stages, checked, splits, strict=True)
        ]
        asked = {"request": self.request, "overrides": self.config.get("overrides") or []}
        return {"command": self.command, **asked, "settled": settled, "stages": entries}

    def _run_of(self, stage: Stage) -> Run:
        return self.at.run(stage.name)

    def _train(self, stage: Stage, settled: Config) -> None:
        """Train a stage, or finish it where it is trained."""
        config = with_settled(stage.config, settled)
        config |= {"runs_dir": str(self.folder), "name": stage.name}
        program = f"dino_lite.commands.{self.command}"
        with outside_hydra(), as_command(program, self.arguments):
            run_pretrain(config, stage.before)

    def _finish(self, stage: Stage) -> None:
        """Do what follows the training of a stage, and note that it is finished."""
        with alone():
            found = stage.after(self._run_of(stage)) if stage.after is not None else None
        known = self.at.read()
        for entry in known["stages"]:
            if entry["name"] == stage.name:
                entry |= {"finished": True, "results": found or {}}
        self.at.write(known)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        why = "is being trained by another process: wait for it, or choose another name=."
        with locked(self.folder, why):
            yield

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Context in which a signal ends the sequence with a sentence. (One that comes while a
        stage is trained is answered there.)
        """
        try:
            yield
        except KeyboardInterrupt as stop:
            if rank() != 0:
                raise SystemExit(0) from None  # the first rank tells
            number = number_of(stop)
            where = f"{self.folder} was interrupted{by_signal(number)}"
            if not self.at.exists():
                raise Interrupted(
                    f"{where} before its first stage; run the same command to start again.", number
                ) from None
            known = self.at.read()["stages"]
            current = next((e["name"] for e in known if not e["finished"]), "its end")
            raise Interrupted(
                f"{where}; run the same command to go on with {current}.", number
            ) from None


def settle(config: Config, splits: Splits) -> Config:
    """The values of SETTLED, by dotted key, that a plan of `config` gives those that are auto."""
    if not any(value == "auto" for _, value in _settling(config)):
        return {}
    begun = begin_config(config)
    planned = plan(begun, gather_facts(begun, splits)).config
    return {key: get(planned, key) for key, value in _settling(config) if value == "auto"}


def with_settled(config: Config, settled: Config) -> Config:
    """`config` with the settled values in the place of "auto"."""
    for key, value in _settling(config):
        if value == "auto" and key in settled:
            config = put(config, key, settled[key])
    return config


def _settling(config: Config) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in leaves(config) if key in SETTLED]


def stage_table(entries: list[dict[str, Any]]) -> str:
    """The stages as a table of text."""
    rows = [STAGE_TITLES, *(stage_cells(entry) for entry in entries)]
    return "\n".join(f"  {line}" for line in aligned(rows))


def _is_spawned() -> bool:
    """Whether Lightning has started this process for another rank of a stage, by the same command
    line. (torchrun and srun start all ranks of the whole sequence.)
    """
    return "LOCAL_RANK" in os.environ and "RANK" not in os.environ and srun_tasks() == 1


def _telling() -> Tell:
    """A function that runs another on the first rank and returns its result on all: the other ranks
    wait for it, as long as it takes.
    """
    if not is_distributed():
        return lambda function: function()
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def tell(function: Callable[[], Any]) -> Any:
        told: list[Any] = [None, False]
        try:
            if rank() == 0:
                told = [function(), True]
        finally:
            dist.broadcast_object_list(told, src=0, group=group)
        if not told[1]:
            raise SystemExit(1)  # the first rank tells why
        return told[0]

    return tell
