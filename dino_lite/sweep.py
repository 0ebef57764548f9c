"""`--multirun`: several jobs with one command line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dino_lite.errors import Interrupted, sentence
from dino_lite.overrides import unquote


class Sweep:
    """The jobs of a sweep so far. The failure of one does not keep the others from running."""

    def __init__(self) -> None:
        self._jobs: list[list[str]] = []
        self._reasons: dict[int, str] = {}  # by the index of a job

    @contextmanager
    def job(self, overrides: Sequence[str]) -> Iterator[None]:
        """Run the job of `overrides`: an error is printed and kept for `report`. Ctrl-C and
        whatever else ends the process end the sweep.
        """
        self._jobs.append([unquote(each) for each in overrides])
        print(f"job {len(self._jobs)}: {' '.join(self._jobs[-1])}", flush=True)
        try:
            yield
            return
        except Interrupted:
            raise
        except SystemExit as end:  # of `dino-lite check`, which has said why
            if end.code != 1:
                raise
            reason: str | None = "exit code 1"
        except Exception as error:
            reason = sentence(error)
            if reason is None:
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
            else:
                print(f"dino-lite: {reason}", file=sys.stderr)
        self._reasons[len(self._jobs) - 1] = str(reason)

    @contextmanager
    def report(self) -> Iterator[None]:
        """At the end, name the jobs that failed by what they do not share, and exit with code 1."""
        try:
            yield
        finally:
            shared = set.intersection(*map(set, self._jobs)) if len(self._jobs) > 1 else set()
            if self._reasons:
                print(f"{len(self._reasons)} of {len(self._jobs)} jobs failed:", file=sys.stderr)
            for index, reason in self._reasons.items():
                own = " ".join(each for each in self._jobs[index] if each not in shared)
                print(f"  job {index + 1} ({own}): {reason}", file=sys.stderr)
        if self._reasons:
            raise SystemExit(1)


def jobs_of(overrides: Sequence[str], loader: Any) -> list[list[str]]:
    """The overrides of each job of a sweep; none if another sweeper chooses them. `loader` is
    Hydra's, which lists the choices that a glob stands for.
    """
    if any(each.startswith("hydra/sweeper") for each in overrides):
        return []
    try:
        parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
        return BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException:
        return [list(overrides)]  # composing them reports the error
