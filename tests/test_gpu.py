"""The same numbers on a GPU: skipped, saying so, where there is none."""

from __future__ import annotations

import pytest
import torch

from dino_lite.contracts import Progress
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
