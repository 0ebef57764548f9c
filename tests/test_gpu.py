"""The same numbers on a GPU: skipped, saying so, where there is none."""

from __future__ import annotations

import pytest
import torch

from dino_lite.contracts import Crops, Progress, Splits
from dino_lite.data.crops import MultiCrop
from dino_lite.data.datamodule import DataModule
from dino_lite.data.photometric import Normalize
from dino_lite.data.sources import ArraySource
from test_dino import make_step, random_crops, tiny_dino


@pytest.mark.gpu
def test_three_steps_on_the_gpu_are_those_of_the_cpu() -> None:
    """Losses, student, teacher and center agree in float64."""
    states = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        method = tiny_dino().double().to(device)
        step = make_step(method)
        for i in range(3):
            torch.manual_seed(i)
            crops = random_crops()
            crops = crops._replace(
                globals_=crops.globals_.double().to(device),
                locals_=None if crops.locals_ is None else crops.locals_.double().to(device),
            )
            step(crops, Progress(i, 3, 3))
        states.append({name: value.cpu() for name, value in method.state_dict().items()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [False, True])
def test_crops_made_on_the_gpu_are_those_of_the_cpu(whole: bool) -> None:
    """Cut out and changed as drawn: equal but for roundings in a thousand values."""
    pixels = torch.randint(0, 256, (12, 40, 36, 3), dtype=torch.uint8)
    multi_crop = MultiCrop(32, 16, 2, where="device")
    source = ArraySource(pixels, None, [], "noise")
    if not whole:
        source.images = source.images.repeat(1, 3, 3, 1)
    levels = Normalize((0, 0, 0), (1 / 255,) * 3)
    data = DataModule(Splits(source, None, "noise"), multi_crop, levels, 12, num_steps=1)
    (parts,) = data.train_dataloader()
    on_cpu = data.on_after_batch_transfer(parts, 0)
    moved = [
        Crops(*(v.cuda() if isinstance(v, torch.Tensor) else v for v in part)) for part in parts
    ]
    on_gpu = data.on_after_batch_transfer(moved, 0)
    assert on_cpu.locals_ is not None
    assert on_gpu.locals_ is not None
    for a, b in ((on_gpu.globals_, on_cpu.globals_), (on_gpu.locals_, on_cpu.locals_)):
        assert a.is_cuda
        assert (a.cpu() - b).abs().mean() < 0.01
