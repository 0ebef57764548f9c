"""Draws crops.png at the start of a run and curves.png at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl

from dino_lite.contracts import Crops, UserError
from dino_lite.eval.curves import curves_picture
from dino_lite.eval.pictures import crops_picture
from dino_lite.settings.kinds import Size
from dino_lite.settings.validate import checked


class Pictures(pl.Callback):
    """Draws into `run_dir` (default: the trainer's root) the crops of `num_images` images of the
    first batch, and at the end the curves in metrics.csv. If a picture cannot be drawn, prints the
    reason and continues.
    """

    @checked
    def __init__(self, run_dir: str | Path | None = None, num_images: Size = 6) -> None:
        self.run_dir, self.num_images = run_dir, num_images
        self._has_seen_batch = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Crops, batch_idx: int
    ) -> None:
        """Draw the first batch; a resumed run keeps its picture."""
        if self._has_seen_batch or not trainer.is_global_zero:
            return
        self._has_seen_batch = True
        path = self._folder(trainer) / "crops.png"
        if not path.exists():
            normalize = cast(Any, trainer).datamodule.normalize
            _draw(lambda: crops_picture(batch, normalize, path, self.num_images))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the curves, after all loggers have written their files."""
        if not trainer.is_global_zero or trainer.global_step == 0:
            return
        for logger in trainer.loggers:
            logger.save()
        folder = self._folder(trainer)
        _draw(lambda: curves_picture(folder / "metrics.csv", folder / "curves.png"))

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.run_dir or trainer.default_root_dir).expanduser()


def _draw(picture: Callable[[], None]) -> None:
    try:
        picture()
    except (UserError, OSError, ValueError) as error:
        sys.stderr.write(f"A picture was not drawn: {error}\n")
