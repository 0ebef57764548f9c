"""Logs to metrics.csv and TensorBoard events, without duplicates after a run is resumed."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter


class MetricsFile(Logger):
    """Lightning logger: a CSV file at `path` sorted by step, and event files next to it.

    Entries that an earlier session logged at or after `resume_step` are dropped from both.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path, self.resume_step = path, resume_step
        self._writer: SummaryWriter | None = None
        self.rows: dict[int, dict[str, str]] = {}
        self._header: list[str] = []
        self._fresh: list[int] = []  # steps not yet in the file

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Does nothing: hyperparameters are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Merge `metrics` into the row of `step`."""
        writer, at = self._open(), int(step or 0)
        row = self.rows.setdefault(at, {"step": str(at)})
        for key, value in metrics.items():
            if key != "epoch":
                row[key] = f"{value:.8g}"
                writer.add_scalar(key, value, at)
        self._fresh.append(at)

    @rank_zero_only
    def save(self) -> None:
        """Append new rows; rewrite the file if a column was added or an old row has changed."""
        known = set(self._header)
        appended = all(self.rows[at].keys() <= known for at in self._fresh)
        if not appended or len(set(self._fresh)) < len(self._fresh):
            self._rewrite()
        elif self._fresh:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._header)
                writer.writerows(self.rows[at] for at in self._fresh)
            self._fresh = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the remaining rows and close the event file."""
        if self._writer is not None:
            self._rewrite()
            self._writer.close()

    def _open(self) -> SummaryWriter:
        """The event writer; the first call also loads the rows of an earlier session."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path.parent), purge_step=self.resume_step or None)
            if self.resume_step and self.path.is_file():
                with open(self.path, newline="", encoding="utf-8") as file:
                    rows = {int(row["step"]): row for row in csv.DictReader(file)}
                for at, row in rows.items():
                    if at < self.resume_step:
                        self.rows[at] = {key: value for key, value in row.items() if value}
                self._rewrite()
        return self._writer

    def _rewrite(self) -> None:
        names = {key for row in self.rows.values() for key in row} - {"step"}
        self._header, self._fresh = ["step", *sorted(names)], []
        partial = self.path.with_suffix(".tmp")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._header)
            writer.writeheader()
            writer.writerows(self.rows[at] for at in sorted(self.rows))
        partial.replace(self.path)
