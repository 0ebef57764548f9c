"""SimDINO: its formulas against plain loops, a head without prototypes, and whole runs."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lite.backbones.vit import ViT
from dino_lite.config import Config, compose
from dino_lite.contracts import Match, Progress, Prototypes, Scores, Targets, UserError
from dino_lite.losses.coding_rate import CodingRateLoss, alignment, coding_rate, rate_scale
from dino_lite.losses.prototype import PrototypeLoss, cross_view_pairs
from dino_lite.methods.dino import DINO
from dino_lite.methods.step import Step
from dino_lite.nn.heads import DINOHead
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant
from dino_lite.planning.plan import plan
from dino_lite.runs.identity import requested, run_name
from dino_lite.runs.pretraining import run_pretrain
from ranks import command
from test_conf import facts
from test_dino import random_crops
from test_health import warnings_of
from tiny import checkpoint, tiny_command

ONE = Constant(1.0)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of unit norm."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def match(z: Tensor, num_teacher: int = 2, weight: Tensor | None = None) -> Match:
    """The student's `z` beside a teacher's vectors; no prototypes."""
    num_images, width = z.shape[1:]
    theirs = unit(num_teacher, num_images, width, seed=1).to(z.dtype)
    none = Prototypes(z.new_zeros(0, width))
    pairs = cross_view_pairs(num_teacher, len(z)) if len(z) > 1 else torch.ones(1, 1)
    if weight is None:
        weight = z.new_full((num_images,), 1 / max(num_images, 1))
    row = torch.zeros_like(theirs[..., 0])
    targets = Targets(theirs, none, row, z.new_zeros(0), 1.0, pairs, weight)
    return Match(Scores(z, none), targets)


def slow_rate(z: Tensor, eps: float) -> float:
    """By the eigenvalues of a covariance summed up row by row."""
    num, width = z.shape
    cov = torch.zeros(width, width, dtype=torch.float64)
    for row in z.double():
        cov += torch.outer(row, row) / num
    values = torch.linalg.eigvalsh(cov).clamp(min=0).tolist()
    return sum(0.5 * math.log(1 + width / eps**2 * value) for value in values)


# ------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(("num", "width"), [(1, 6), (3, 8), (8, 8), (20, 5), (40, 1)])
@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_the_rate_is_that_of_the_eigenvalues(num: int, width: int, eps: float) -> None:
    """From either side of the matrix, for several crops at once."""
    z = unit(2, num, width)
    expected = [slow_rate(crop, eps) for crop in z]
    assert coding_rate(z, eps).tolist() == pytest.approx(expected, rel=1e-9)


def test_the_rate_knows_no_axes_and_no_order() -> None:
    """Rotated and shuffled rows have the rate of the rows."""
    z = unit(12, 7)
    turn = torch.linalg.qr(unit(7, 7, seed=2)).Q
    shuffled = (z @ turn)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(coding_rate(shuffled, 0.1), coding_rate(z, 0.1))


def test_the_rate_is_least_of_equal_rows_and_largest_of_orthogonal_ones() -> None:
    """At both ends by the closed form; random rows lie between."""
    num, width, eps = 6, 6, 0.1
    same = unit(1, width).expand(num, width)
    assert float(coding_rate(same, eps)) == pytest.approx(0.5 * math.log(1 + width / eps**2))
    spread = torch.linalg.qr(unit(width, width)).Q
    largest = 0.5 * num * math.log(1 + 1 / eps**2)
    assert float(coding_rate(spread, eps)) == pytest.approx(largest)
    assert float(coding_rate(same, eps)) < float(coding_rate(unit(num, width), eps)) < largest


@pytest.mark.parametrize(("num", "width"), [(1, 256), (3, 256), (64, 256), (300, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_slope_are_finite_and_near_float64(
    num: int, width: int, dtype: torch.dtype
) -> None:
    """Of equal rows as of random ones, in single and half precision, under autocast too."""
    for rows in (unit(num, width), unit(1, width).expand(num, width)):
        z = rows.to(dtype).detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rate = coding_rate(z, 0.05)
        rate.backward()
        assert rate.dtype == torch.float32
        assert z.grad is not None
        assert bool(z.grad.isfinite().all())
        assert rate.item() == pytest.approx(slow_rate(z.detach(), 0.05), rel=2e-3)


def test_what_precision_cannot_hold_is_no_number() -> None:
    """Not an error amid a run: the step is then skipped, as any that is not finite."""
    z = torch.zeros(2, 8)
    z[:, 0] = 1.0
    assert math.isnan(float(coding_rate(z, 2.0**-20)))


@pytest.mark.parametrize(("num", "width"), [(1, 4), (4, 16), (16, 4), (9, 9)])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_the_scaled_rate_has_a_slope_of_at_most_a_half(num: int, width: int, size: float) -> None:
    """Whatever the rows' number, width and length."""
    z = (size * unit(num, width)).requires_grad_()
    for eps in (0.05, 0.5):
        (slope,) = torch.autograd.grad(coding_rate(z, eps), z)
        assert rate_scale(num, width, eps) * float(slope.norm()) <= 0.5 + 1e-9


def test_the_bound_is_met() -> None:
    """By orthogonal rows of the length where the slope is steepest."""
    eps = 0.1
    z = (eps * torch.eye(5, dtype=torch.float64)).requires_grad_()  # E = n: a = 1/ε²
    (slope,) = torch.autograd.grad(coding_rate(z, eps), z)
    assert rate_scale(5, 5, eps) * float(slope.norm()) == pytest.approx(0.5)


def test_alignment_is_the_sum_over_pairs_and_images() -> None:
    """Of halved squared distances, weighed; rows need not be of unit norm."""
    weight = torch.tensor([0.5, 0.1, 0.2, 0.2], dtype=torch.float64)
    found = match(2 * unit(4, 4, 5), weight=weight)
    assert isinstance(found.student, Scores)
    assert isinstance(found.target, Targets)
    total = 0.0
    for t in range(2):
        for s in range(4):
            for i in range(4):
                gap = found.student.z[s, i] - found.target.z[t, i]
                total += float(found.target.pairs[t, s] * weight[i] * 0.5 * (gap**2).sum())
    assert float(alignment(found.student.z, found.target)) == pytest.approx(total)


@pytest.mark.parametrize(("num_images", "width"), [(3, 5), (6, 4), (1, 3)])
def test_the_slope_is_that_of_finite_differences(num_images: int, width: int) -> None:
    """Of the whole loss, in every entry of every crop."""
    loss = CodingRateLoss("embedding", ONE, gamma=0.7, eps=0.3)
    z = unit(4, num_images, width).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(match(z)), (z,))


# ---------------------------------------------------------------------------------- the adapter


def test_the_loss_is_alignment_less_the_rate_of_the_teachers_crops() -> None:
    """Local crops are aligned alone; each global crop has a rate of its own."""
    z, eps = unit(5, 6, 4), 0.2
    found = match(z)
    assert isinstance(found.target, Targets)
    rate = sum(slow_rate(crop, eps) for crop in z[:2]) / 2
    expected = float(alignment(z, found.target)) - 3 * eps * math.sqrt(6 / 16) * rate
    loss = CodingRateLoss("embedding", Constant(0.5), gamma=3.0, eps=eps)
    assert float(loss(found)) == pytest.approx(expected)  # the weight is the step's to apply
    assert loss.reads == "embedding"


def test_micro_batches_of_whole_groups_add_up() -> None:
    """To the whole batch's loss, a last group of fewer images included; and each rate is that of
    its own images.
    """
    whole = match(unit(4, 6, 3))
    assert isinstance(whole.student, Scores)
    assert isinstance(whole.target, Targets)
    bounds = [(0, 4), (4, 6)]
    parts = [
        Match(whole.student._replace(z=whole.student.z[:, a:b]), whole.target.part(a, b))
        for a, b in bounds
    ]
    only = CodingRateLoss("embedding", ONE, gamma=0.0)
    assert sum(float(only(part)) for part in parts) == pytest.approx(float(only(whole)))
    loss = CodingRateLoss("embedding", ONE, num_images=4)
    assert sum(float(loss(part)) for part in parts) == pytest.approx(float(loss(whole)))
    for (a, b), part in zip(bounds, parts, strict=True):
        rate = float(coding_rate(whole.student.z[:2, a:b], 0.05).mean())
        expected = float(only(part)) - (b - a) / 6 * rate_scale(b - a, 3, 0.05) * rate
        assert float(loss(part)) == pytest.approx(expected)


def test_alignment_alone_takes_masked_patches_and_none_of_them() -> None:
    """One row of patches with weights of their own, or an empty one."""
    loss = CodingRateLoss("patch_embedding", ONE, gamma=0.0)
    patches = match(unit(1, 7, 4), 1)
    assert isinstance(patches.student, Scores)
    assert isinstance(patches.target, Targets)
    cosines = (patches.student.z[0] * patches.target.z[0]).sum(-1)
    assert float(loss(patches)) == pytest.approx(float((1 - cosines).mean()))
    assert float(loss(match(unit(1, 0, 4), 1))) == 0.0


@pytest.mark.parametrize(("key", "value"), [("gamma", -1.0), ("eps", 0.0), ("num_images", 1)])
def test_impossible_settings_are_sentences(key: str, value: float) -> None:
    """Named by their key."""
    with pytest.raises(UserError, match=f"CodingRateLoss.{key}="):
        CodingRateLoss("embedding", ONE, **{key: value})


# ----------------------------------------------------------------------- a head without prototypes


def method() -> DINO:
    """A tiny one."""
    torch.manual_seed(0)
    backbone = ViT(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    head = partial(DINOHead, num_prototypes=0, hidden_dim=16, bottleneck_dim=8)
    return DINO(backbone, head, Constant(0.9), Constant(0.04))


def step_of(student: DINO, loss: Any) -> Step:
    """One step of it, its last layer frozen for longer than the test."""
    optimizer = torch.optim.AdamW(param_groups(student.student))
    settings: dict[str, Any] = {"learning_rate": Constant(1e-3), "weight_decay": Constant(0.0)}
    return Step(student, {"simdino": loss}, optimizer, freeze_last_layer=1.0, **settings)


def test_a_head_without_prototypes_has_no_weights_for_them() -> None:
    """They are an empty matrix of the bottleneck's width."""
    head = DINOHead(6, 0, hidden_dim=5, bottleneck_dim=4)
    assert not [name for name, _ in head.named_parameters() if "last_layer" in name]
    assert head.prototypes().direction.shape == (0, 4)
    assert head(torch.randn(3, 6)).shape == (3, 4)
    assert DINOHead(6, 0, bottleneck_dim=4, num_layers=1).prototypes().rows().shape == (0, 4)


def test_a_method_without_prototypes_learns_and_comes_back() -> None:
    """It moves, its temperature is not told, and a twin takes its state."""
    ours, crops = method(), random_crops(5, 2)
    step = step_of(ours, CodingRateLoss("embedding", ONE))
    losses = [float(step(crops, Progress(i, 40, 40))["loss"]) for i in range(20)]
    assert losses[-1] < losses[0]
    assert set(ours.schedules()) == {"momentum"}
    twin = method()
    twin.load_state_dict(ours.state_dict())
    a, b = (m.targets(crops, Progress(0, 1, 1))["embedding"] for m in (ours, twin))
    assert torch.equal(a.z, b.z)  # type: ignore[attr-defined]


def test_a_prototype_loss_has_nothing_to_read() -> None:
    """The step says what there is."""
    with pytest.raises(UserError, match="reads 'cls', but DINO provides embedding"):
        step_of(method(), PrototypeLoss("cls", ONE))


def test_with_prototypes_both_matches_are_one() -> None:
    """A coding rate reads what the cross-entropy reads."""
    head = partial(DINOHead, num_prototypes=5, hidden_dim=16, bottleneck_dim=8)
    backbone = ViT(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    both, crops = DINO(backbone, head, Constant(0.9), Constant(0.04)), random_crops(3, 0)
    found = both.compare(crops, both.targets(crops, Progress(0, 1, 1)))
    assert tuple(found) == both.provides == ("embedding", "tokens", "cls")
    assert found["embedding"] is found["cls"]


# ------------------------------------------------------------------------------------------ runs


def asked(runs_dir: Path, *overrides: str) -> Config:
    """A tiny run of SimDINO."""
    groups = ["method=simdino", "loss=[simdino]", "method.head.num_prototypes=0"]
    return compose("pretrain", tiny_command(runs_dir, *groups, *overrides))


def test_the_batch_stays_whole_however_large(tmp_path: Path) -> None:
    """Micro-batches would change the rate."""
    config = asked(tmp_path, "loader.batch_size=100000", "trainer.micro_batch_size=auto")
    planned = plan(config, facts(source="shapes")).config
    assert planned["trainer"]["micro_batch_size"] == 0


def test_a_run_keeps_its_micro_batches(tmp_path: Path) -> None:
    """They are part of the request where a rate is, and of none where alignment is alone."""
    key = "trainer.micro_batch_size"
    assert requested(asked(tmp_path))[key] == "auto"
    assert key not in requested(asked(tmp_path, "loss.simdino.gamma=0"))


def test_a_run_is_called_by_the_choice_of_its_method(tmp_path: Path) -> None:
    """In its name and in nothing that the name is made from; old configurations by the class."""
    config = asked(tmp_path)
    assert config["choices"] == {"method": "simdino"}
    known, request = facts(source="shapes"), requested(config)
    assert not [key for key in request if key.startswith(("choices", "overrides"))]
    planned = plan(config, known).config
    name = run_name(planned, request, known)
    assert name.startswith("simdino_shapes_vit_")
    del planned["choices"]
    assert run_name(planned, request, known) == name.removeprefix("sim")


@pytest.mark.slow
def test_a_run_logs_numbers_and_none_of_prototypes(tmp_path: Path) -> None:
    """Its loss, the spread of embeddings and the momentum (it resumes in test_methods.py)."""
    run = Path(run_pretrain(asked(tmp_path))["run"])
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"loss", "simdino", "embedding_std", "momentum"} <= set(rows[0])
    assert not {"teacher_temp", "teacher_entropy", "prototypes_used"} & set(rows[0])
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)


@pytest.mark.slow
def test_two_processes_train_it_by_the_command_line(tmp_path: Path) -> None:
    """Every weight has a gradient, so none waits for another; the run has its method's name."""
    groups = ["method=simdino", "loss=[simdino]", "method.head.num_prototypes=0"]
    options = [*groups, "trainer.devices=2", "callbacks.pictures=null", "trainer.max_steps=3"]
    result = command("pretrain", *tiny_command(tmp_path, *options), ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    (run,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert run.name.startswith("simdino_shapes_vit_")
    assert checkpoint(run)["global_step"] == 3


@pytest.mark.slow
def test_constant_features_are_an_alarm(tmp_path: Path) -> None:
    """Alignment alone makes the same of every image; with the rate no alarm is raised."""
    options = ["trainer.max_steps=60", "callbacks.pictures=null", "callbacks.online_eval=null"]
    alone = run_pretrain(asked(tmp_path, *options, "optim.rate=0.05", "loss.simdino.gamma=0"))
    assert [w["kind"] for w in warnings_of(Path(alone["run"]))] == ["constant_features"]
    assert warnings_of(Path(run_pretrain(asked(tmp_path, *options))["run"])) == []
