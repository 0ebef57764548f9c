"""metrics.csv: one row a logged step, kept whole when a run is resumed."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


class MetricsFile(Logger):
    """Lightning logger writing `path`, sorted by step; rows past the step a run resumes from are dropped."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, str]] = {}
        self._header: list[str] = []
        self._fresh: list[int] = []  # steps that are not in the file yet

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def resume(self, step: int) -> None:
        """Read the rows of an earlier session up to `step`."""
        if not self.path.is_file():
            return
        with open(self.path, newline="", encoding="utf-8") as file:
            rows = {
                int(row["step"]): {k: v for k, v in row.items() if v}
                for row in csv.DictReader(file)
            }
        self.rows = {at: row for at, row in rows.items() if at < step}
        self._rewrite()

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Merge `metrics` into the row of `step`."""
        at = int(step or 0)
        row = self.rows.setdefault(at, {"step": str(at)})
        row.update({key: f"{value:.8g}" for key, value in metrics.items() if key != "epoch"})
        self._fresh.append(at)

    @rank_zero_only
    def save(self) -> None:
        """Append new rows; write the file anew where a column or an old row has changed."""
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
        """Write what is left."""
        self._rewrite()

    def _rewrite(self) -> None:
        names = {key for row in self.rows.values() for key in row} - {"step"}
        self._header, self._fresh = ["step", *sorted(names)], []
        partial = self.path.with_suffix(".tmp")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._header)
            writer.writeheader()
            writer.writerows(self.rows[at] for at in sorted(self.rows))
        partial.replace(self.path)
