"""crops.png when a run begins, curves.png when it ends."""

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
    """Draws into `run_dir` (none given: the trainer's root) the crops of `num_images` images of the
    first batch, and at the end the curves of its metrics.csv. A picture that cannot be drawn is a
    line of text, not the run's end.
    """

    @checked
    def __init__(self, run_dir: str | Path | None = None, num_images: Size = 6) -> None:
        self.run_dir, self.num_images = run_dir, num_images
        self._has_seen_batch = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Crops, batch_idx: int
    ) -> None:
        """The run's first batch; a run that goes on keeps the picture it has."""
        if self._has_seen_batch or not trainer.is_global_zero:
            return
        self._has_seen_batch = True
        path = self._folder(trainer) / "crops.png"
        if not path.exists():
            normalize = cast(Any, trainer).datamodule.normalize
            _draw(lambda: crops_picture(batch, normalize, path, self.num_images))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The curves, once every logger has written what it holds."""
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
        sys.stderr.write(f"A picture was left out: {error}\n")
