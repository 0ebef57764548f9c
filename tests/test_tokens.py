"""The match "tokens": every method with a student backbone provides it, with patches on request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from dino_lite.config import compose
from dino_lite.contracts import Crops, Loss, Match, Progress, Schedule, Targets, Tokens
from dino_lite.losses.koleo import KoLeoLoss, koleo
from dino_lite.methods.dino import DINO
from dino_lite.methods.step import Step
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant
from dino_lite.runs.pretraining import run_pretrain
from test_dino import random_crops, tiny_dino
from tiny import tiny_command

START = Progress(0, 10, 5)


class PatchNorm(Loss):
    """Mean squared length of the student's patches."""

    def __init__(self, reads: str = "tokens", weight: Schedule = Constant(1.0)) -> None:  # noqa: B008
        self.reads, self.weight = reads, weight

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        assert isinstance(match.student, Tokens)
        return match.student.patches.square().mean()


def tokens_of(method: DINO, crops: Crops) -> tuple[Tokens, Targets]:
    match = method.compare(crops, method.targets(crops, START))["tokens"]
    assert isinstance(match.student, Tokens)
    assert isinstance(match.target, Targets)
    return match.student, match.target


def test_tokens_are_those_of_the_students_global_crops() -> None:
    """Crop-major, without patches unless a loss reads them, and with the images' weights."""
    method, crops = tiny_dino(), random_crops()
    tokens, target = tokens_of(method, crops)
    assert tokens.patches.shape[1] == 0
    with torch.no_grad():
        whole = method.student.backbone(crops.globals_.flatten(0, 1))
    torch.testing.assert_close(tokens.cls, whole.cls)
    loss = KoLeoLoss("tokens", Constant(0.1))(Match(tokens, target))
    each = whole.cls.unflatten(0, crops.globals_.shape[:2])
    wanted = torch.stack([koleo(crop, target.weight) for crop in each]).sum()
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize(
    ("losses", "patches"),
    [
        ({"koleo": KoLeoLoss("tokens", Constant(0.1))}, False),
        ({"norm": PatchNorm()}, True),
        ({"koleo": KoLeoLoss("tokens", Constant(0.1)), "norm": PatchNorm()}, True),
    ],
)
def test_patches_are_computed_where_a_loss_reads_them(
    losses: dict[str, Loss], patches: bool
) -> None:
    """A step says so to its method."""
    method = tiny_dino()
    optimizer = torch.optim.AdamW(param_groups(method.student))
    step = Step(method, losses, optimizer, learning_rate=Constant(1e-3), weight_decay=Constant(0.0))
    assert (tokens_of(method, random_crops())[0].patches.shape[1] > 0) is patches
    scalars = step(random_crops(), START)
    assert all(torch.isfinite(value) for value in scalars.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_koleo_is_a_term_of_any_method(method: str, tmp_path: Path) -> None:
    """By the list of losses on the command line."""
    words = [f"method={method}", "loss=[dino,koleo]", "backbone.patch_size=4"]
    words += ["method.masking=null"] if method == "dinov2" else []
    run = Path(run_pretrain(compose("pretrain", tiny_command(tmp_path, *words)))["run"])
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"dino", "koleo"} <= set(header)
