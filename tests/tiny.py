"""A run that takes seconds: the embedded set at 16 pixels, a ViT of two blocks, eight steps."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image

from dino_lite.config import Config, compose, put
from dino_lite.contracts import Backbone
from dino_lite.data.clean import CleanData
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.eval.baselines import raw_pixels
from dino_lite.eval.features import Features, extract
from dino_lite.formats.opened import Opened
from dino_lite.formats.safetensors import SafeTensors
from dino_lite.runs.pretraining import run_pretrain

TINY = {
    "data.num_train": 44,
    "data.num_test": 20,
    "augment.global_size": 16,
    "augment.local_size": 8,
    "augment.num_local": 2,
    "backbone.patch_size": 8,
    "backbone.embed_dim": 32,
    "backbone.depth": 2,
    "backbone.num_heads": 2,
    "method.head.num_prototypes": 32,
    "method.head.hidden_dim": 32,
    "method.head.bottleneck_dim": 16,
    "loader.batch_size": 8,
    "loader.num_workers": 0,
    "trainer.max_steps": 8,
    "trainer.accelerator": "cpu",
    "trainer.precision": "32",  # whatever this CPU would choose
    "trainer.compile": False,
    "optim.freeze_last_layer": "2 steps",
    "baselines": False,
}
# Drawing crops and curves takes as long as the steps do: `tiny` leaves it out unless asked.
WITH_PICTURES = "callbacks.pictures={_target_: dino_lite.callbacks.drawing.Pictures}"


@functools.cache
def _composed(primary: str, data: str) -> Config:
    return compose(primary, [f"data={data}"])


def tiny(
    runs_dir: Path, *overrides: str, data: str = "shapes", primary: str = "pretrain"
) -> Config:
    """The configuration of a tiny run, or of its check, "key=value" on top."""
    config = _composed(primary, data)
    for key, value in TINY.items():
        if data == "shapes" or not key.startswith("data."):
            config = put(config, key, value)
    if primary == "pretrain":
        config = put(config, "callbacks.pictures", None)
    for override in overrides:
        key, _, value = override.partition("=")
        config = put(config, key, yaml.safe_load(value))
    return put(config, "runs_dir", str(runs_dir))


def tiny_command(runs_dir: Path, *overrides: str) -> list[str]:
    """The same as arguments of the command line."""
    keys = [f"{key}={value}" for key, value in TINY.items()]
    return ["data=shapes", *keys, f"runs_dir={runs_dir}", *overrides]


def train(runs_dir: Path, *overrides: str, data: str = "shapes") -> Path:
    """Run it in this process; the run's folder."""
    return Path(run_pretrain(tiny(runs_dir, *overrides, data=data))["run"])


def exported(backbone: Backbone, folder: Path, size: int = 32, **card: Any) -> Path:
    """The backbone as `dino-lite export` writes it, unverified."""
    folder.mkdir(parents=True, exist_ok=True)
    how = Preprocessing((size, size), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    SafeTensors().write(Opened(backbone.eval(), how, card), folder)
    return folder


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    """A checkpoint's content, loaded safely."""
    content: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def photos(folder: Path, names: list[str], size: tuple[int, int] = (40, 30)) -> Path:
    """Noise images under `folder`, one a name; deterministic."""
    generator = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def pixel_features(data: CleanData, size: int = 32) -> tuple[Features, Features | None]:
    """Pixels of train and test at size x size, less train's mean image."""
    pixels, (train, test) = raw_pixels(data, 8, size), data.splits[:2]
    cpu = torch.device("cpu")
    return extract(pixels, data, train, cpu), test and extract(pixels, data, test, cpu)


class StopAt(pl.Callback):
    """Interrupts a run after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Send this process the signal of Ctrl-C where the step is reached."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
