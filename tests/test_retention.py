"""Retention: zero at the first step for every method, loops, parts and ranks; what must stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from dino_lite.backbones.blocks import evaluating, set_memory
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.noise import is_noisy
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Anchor, Backbone, Crops, Kept, Match, Progress, Tokens, UserError
from dino_lite.data.photometric import Normalize
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.distributed import all_reduce_mean_
from dino_lite.losses.gram import GramLoss, regrid
from dino_lite.losses.kept import KeptLoss, kept_distance
from dino_lite.losses.koleo import KoLeoLoss
from dino_lite.losses.prototype import PrototypeLoss
from dino_lite.methods.dino import DINO
from dino_lite.methods.dinov2 import DINOv2
from dino_lite.methods.frozen import FrozenTeacher, Network
from dino_lite.methods.method import Method
from dino_lite.methods.retention import Retention
from dino_lite.methods.step import Step
from dino_lite.nn.centering import SinkhornKnopp
from dino_lite.nn.heads import DINOHead
from dino_lite.nn.masking import BlockMasking
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant, Cosine
from ranks import on_ranks
from test_dino import random_crops

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)
START = Progress(0, 10, 5)
_SIZES: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def vit(**settings: Any) -> ViT:
    """Two blocks on 16 pixels."""
    return ViT(image_size=16, **_SIZES | settings)


def rope(**settings: Any) -> RoPEViT:
    """Two of DINOv3's blocks."""
    return RoPEViT(**_SIZES | settings)


def convnet(**settings: Any) -> ConvNet:
    """Two stages with batch normalization, whose statistics are not those of new weights."""
    network = ConvNet(patch_size=4, widths=[8, 16], depths=[1, 1], drop_path=0.3, **settings)
    for _ in range(3):
        network(torch.randn(8, 3, 16, 16) + 1)
    return network


def dino(backbone: Backbone, num_prototypes: int = 12) -> DINO:
    """DINO, or with 0 prototypes SimDINO."""
    head = partial(DINOHead, num_prototypes=num_prototypes, hidden_dim=16, bottleneck_dim=8)
    return DINO(backbone, head, Constant(0.9), Constant(0.05))


def dinov2(backbone: Backbone, masked: bool = True) -> DINOv2:
    """Three of four crops are masked."""
    head = partial(DINOHead, num_prototypes=12, hidden_dim=16, bottleneck_dim=8)
    masking = BlockMasking(sample_prob=0.75, ratio=(0.3, 0.8)) if masked else None
    return DINOv2(backbone, head, Constant(0.9), Constant(0.05), SinkhornKnopp, masking, head)


METHODS: dict[str, Callable[[], Method]] = {
    "dino": lambda: dino(vit()),
    "drop path": lambda: dino(vit(drop_path=0.5, drop_path_by="batch")),
    "simdino": lambda: dino(vit(), 0),
    "dinov2": lambda: dinov2(vit(mask_token=True, drop_path=0.5, num_registers=2)),
    "unmasked": lambda: dinov2(vit(), masked=False),
    "dinov3": lambda: dinov2(rope(mask_token=True, rope_shift=0.5, rope_rescale=2.0)),
    "jitter": lambda: dino(rope(rope_jitter=1.5)),
    "convnet": lambda: dino(convnet()),
    "pyramid": lambda: dino(convnet(fields=2, norm="group")),
}
MASKS_OR_DRAWS = {"drop path", "dinov2", "dinov3", "jitter", "convnet", "pyramid"}


def loud(method: Method) -> Method:
    """The same method with weights that are large enough to matter."""
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def frozen(backbone: Backbone, mean: tuple[float, ...] = MEAN) -> FrozenTeacher:
    """The network as it is now, trained with pixels of another mean if asked."""
    how = Preprocessing((16, 16), mean, STD)
    network = Network(copy.deepcopy(backbone), how, {})
    return FrozenTeacher("start", "0" * 16, lambda: network, Normalize(MEAN, STD))


def step_of(
    method: Any,
    teacher: FrozenTeacher | None = None,
    patches: float = 1.0,
    with_koleo: bool = False,
    **settings: Any,
) -> Step:
    """The method's first loss with both losses of retention."""
    if method.masks_crops:
        loss: dict[str, Any] = {
            "dino": PrototypeLoss("cls", Constant(1.0)),
            "ibot": PrototypeLoss("patch", Constant(1.0)),
        }
    elif "cls" in method.provides:
        loss = {"dino": PrototypeLoss("cls", Constant(1.0))}
    else:
        loss = {"koleo": KoLeoLoss("tokens", Constant(1.0))}
    if with_koleo:  # which reads class tokens of a pass over all of them
        loss["koleo"] = KoLeoLoss("tokens", Constant(0.1))
    loss["kept"] = KeptLoss("kept", Constant(2.0), patches)
    if patches:
        loss["kept_gram"] = GramLoss("kept_gram", Constant(3.0))
    optimizer = torch.optim.AdamW(param_groups(method.student), fused=True)
    rates = {"learning_rate": Cosine(1e-2, 1e-3), "weight_decay": Constant(0.04)}
    kept = Retention(teacher or frozen(method.student.backbone))
    return Step(method, loss, optimizer, retention=kept, **rates | settings)


# ------------------------------------------------------------------------------------ first step


@pytest.mark.parametrize("patches", [1.0, 0.0])
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_lost_at_the_first_step(name: str, patches: float) -> None:
    """Exactly zero, in training mode as a run has it; more than that once the weights move."""
    method = loud(METHODS[name]()).train()
    step, crops = step_of(method, patches=patches), random_crops(4, 2)
    kept = ["kept", "kept_gram"] if patches else ["kept"]
    first = step(crops, START)
    assert [float(first[each]) for each in kept] == [0.0] * len(kept)
    second = step(crops, Progress(1, 10, 5))
    assert all(float(second[each]) > 1e-6 for each in kept)


@pytest.mark.parametrize("memory", ["high", "normal", "low"])
def test_nothing_is_lost_at_the_first_step_in_half_precision(memory: Any) -> None:
    """Under autocast too, with each way to save activations."""
    method = loud(METHODS["dinov2"]()).train()
    set_memory(method, memory, compiled=False)
    first = step_of(method, autocast=torch.bfloat16)(random_crops(4, 2), START)
    assert float(first["kept"]) == float(first["kept_gram"]) == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_another_pass_only_where_the_methods_own_would_differ(name: str) -> None:
    """Passes of the student's backbone over global crops are counted."""
    method: Any = METHODS[name]()
    step, seen = step_of(method), []
    method.student.backbone.register_forward_hook(lambda net, x, y: seen.append(x[0].shape[-1]))
    step(random_crops(4, 2), START)
    assert seen.count(16) == (2 if name in MASKS_OR_DRAWS else 1)


def test_a_backbone_of_another_package_is_seen_once_more() -> None:
    """What it draws in training is unknown."""

    class Other(Backbone):
        pass

    assert is_noisy(Other())
    assert not is_noisy(vit())


@pytest.mark.parametrize("name", ["dinov2", "convnet"])
def test_the_further_pass_leaves_no_trace(name: str) -> None:
    """With weights of zero, weights, statistics, moments and modes are those without retention."""
    method: Any = loud(METHODS[name]()).train()
    plain, crops = copy.deepcopy(method), random_crops(4, 2)
    with_it = step_of(method)
    for loss in ("kept", "kept_gram"):
        with_it.losses[loss].weight = Constant(0.0)
    without = step_of(plain)
    without.retention = None
    for i in range(2):
        with_it(crops, Progress(i, 10, 5))
        without(crops, Progress(i, 10, 5))
    states = method.state_dict(), plain.state_dict()
    assert all(torch.equal(value, states[1][n]) for n, value in states[0].items())
    assert all(part.training for part in method.student.modules())


def test_a_pass_in_eval_mode_is_recomputed_in_eval_mode() -> None:
    """memory=low: drop path stays out of it although the network is in training mode by then."""
    network, images = vit(drop_path=0.9).train(), torch.randn(4, 3, 16, 16)

    def slopes(memory: Any) -> list[Tensor]:
        network.set_memory(memory, False)
        network.zero_grad()
        with evaluating(network):
            tokens = network(images)
        tokens.patches.square().sum().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    for low, high in zip(slopes("low"), slopes("high"), strict=True):
        torch.testing.assert_close(low, high)


# --------------------------------------------------------------------------------- the arithmetic


def test_the_distance_is_the_loops() -> None:
    """Value and gradient; a scale of both changes nothing."""
    student = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    start = torch.randn(3, 5, 8, dtype=torch.float64)
    found = kept_distance(student, start)
    wanted = oracle.kept(student, start)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0)
    slopes = [torch.autograd.grad(x.sum(), student)[0] for x in (found, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kept_distance(7 * student, 7 * start), found)
    assert torch.equal(kept_distance(start, start), torch.zeros(3, 5, dtype=torch.float64))
    assert kept_distance(torch.zeros(1, 4), torch.zeros(1, 4)).isfinite().all()


def test_crops_count_alike_and_images_by_their_weight() -> None:
    """Rows are crop-major; patches have a weight of their own."""
    mine, theirs = (torch.randn(6, 4, 8, dtype=torch.float64) for _ in range(2))
    weight = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)
    tokens = Tokens(mine[:, 0], mine[:, 1:], None, (1, 3))
    target = Kept(theirs[:, 0].view(2, 3, 8), theirs[:, 1:].view(2, 3, 3, 8), weight)
    wanted = sum(
        weight[i]
        * (
            oracle.kept(mine[3 * g + i, :1], theirs[3 * g + i, :1]).mean()
            + 0.3 * oracle.kept(mine[3 * g + i, 1:], theirs[3 * g + i, 1:]).mean()
        )
        / 2
        for g in range(2)
        for i in range(3)
    )
    found = KeptLoss("kept", Constant(1.0), 0.3)(Match(tokens, target))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0)
    sums = []
    for a, b in ((0, 2), (2, 3)):
        rows = [x.unflatten(0, (2, 3))[:, a:b].flatten(0, 1) for x in tokens[:2]]
        part = Tokens(rows[0], rows[1], None, (1, 3))
        sums.append(KeptLoss("kept", Constant(1.0), 0.3)(Match(part, target.part(a, b))))
    torch.testing.assert_close(sum(sums), found, rtol=1e-12, atol=0.0)


def test_pixels_and_grids_of_another_network_are_matched() -> None:
    """The frozen network sees its own normalization; its patches come to the student's grid."""
    method: Any = loud(dino(vit())).double()
    finer = loud_network(vit(patch_size=2)).double().eval()
    teacher, crops = frozen(finer, (0.1, 0.2, 0.3)), random_crops(2, 0, dtype=torch.float64)
    step = step_of(method, teacher)
    seen: dict[str, Match] = {}
    step(crops, START, seen.update)
    mean, own = (
        torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (MEAN, (0.1, 0.2, 0.3))
    )
    scale = torch.tensor(STD, dtype=torch.float64)[:, None, None]
    pixels = crops.globals_.flatten(0, 1) * scale + mean
    with torch.no_grad():
        wanted = finer((pixels - own) / scale)
    target = seen["kept"].target
    assert isinstance(target, Kept)
    torch.testing.assert_close(target.cls.flatten(0, 1), wanted.cls)
    patches = regrid(wanted.patches, (8, 8), (4, 4))
    torch.testing.assert_close(target.patches.flatten(0, 1), patches)
    anchor = seen["kept_gram"].target
    assert isinstance(anchor, Anchor)
    assert anchor.patches is target.patches
    assert not target.cls.requires_grad


def loud_network(network: Backbone) -> Backbone:
    """Weights that are large enough to matter."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def test_no_weight_of_the_frozen_network_is_the_methods() -> None:
    """Nothing of it in a state dict, and no gradient."""
    method: Any = METHODS["dinov2"]()
    before, teacher = set(method.state_dict()), frozen(method.student.backbone)
    step = step_of(method, teacher)
    step(random_crops(2, 0), START)
    assert set(method.state_dict()) == before
    assert all(p.grad is None for p in teacher.network.backbone.parameters())
    assert not isinstance(step.retention, nn.Module)


def test_features_of_another_width_are_refused() -> None:
    """Gram matrices of them go well."""
    method: Any = dino(vit())
    step = step_of(method, frozen(vit(embed_dim=32)))
    with pytest.raises(UserError, match="32 numbers cannot be kept by a backbone of 16"):
        step(random_crops(2, 0), START)
    del step.losses["kept"]
    assert step(random_crops(2, 0), START)["kept_gram"].isfinite()


def test_losses_of_retention_need_a_frozen_network() -> None:
    """And without such a loss, the frozen network is never opened."""
    method = dino(vit())
    settings: dict[str, Any] = {"learning_rate": Constant(0.1), "weight_decay": Constant(0.0)}
    optimizer = torch.optim.SGD(param_groups(method.student))
    kept = {"kept": KeptLoss("kept", Constant(1.0))}
    with pytest.raises(UserError, match=r"loss\.kept reads 'kept'.* set teacher\.checkpoint"):
        Step(method, kept, optimizer, **settings)
    step = step_of(method)
    names = {"dino": step.losses["dino"]}
    other = Step(method, names, optimizer, retention=Retention(frozen(vit())), **settings)
    assert other.retention is None


# ------------------------------------------------------------------------------- parts and ranks


def train(size: int, part: slice, exchange: bool) -> dict[str, dict[str, Tensor]]:
    """Two steps of three methods on a part of the batch."""
    found = {}
    for name in ("dino", "dinov2", "dinov3"):
        torch.manual_seed(3)
        method: Any = loud(METHODS[name]()).double().train()
        for block in method.student.backbone.blocks:  # drawn for each micro-batch
            block.drop_path1 = block.drop_path2 = nn.Identity()
        if name == "dinov3":  # drawn once a pass
            method.student.backbone.positions.moves = False
        teacher = frozen(loud_network(copy.deepcopy(method.student.backbone)))
        step = step_of(method, teacher, micro_batch_size=size)

        def backward(total: Tensor, method: Any = method) -> None:
            total.backward()

        step.backward = backward
        crops = random_crops(4, 2, dtype=torch.float64)
        crops = crops.part(part.start, part.stop)
        if exchange:
            _exchange_at_the_last(step, method, size, crops)
        for i in range(2):
            step(crops, Progress(i, 10, 5))
        found[name] = {n: v for n, v in method.student.state_dict().items()}
    return found


def _exchange_at_the_last(step: Step, method: Any, size: int, crops: Crops) -> None:
    """As DDP does: after the last micro-batch, gradients are averaged over ranks."""
    count, last = [0], -(-crops.num_images // (size or crops.num_images))

    def backward(total: Tensor) -> None:
        total.backward()
        count[0] += 1
        if count[0] % last == 0:
            for parameter in method.student.parameters():
                if parameter.grad is not None:
                    all_reduce_mean_(parameter.grad)

    step.backward = backward


def half(rank: int) -> dict[str, dict[str, Tensor]]:
    """Two images of four, one a micro-batch."""
    return train(1, slice(2 * rank, 2 * rank + 2), exchange=True)


def test_two_processes_with_micro_batches_make_the_steps_of_one() -> None:
    """2x2 equals 1x1 and 1x4 in float64."""
    whole, parts = (train(size, slice(0, 4), exchange=False) for size in (0, 1))
    for other in (parts, *on_ranks(2, half)):
        for name, state in whole.items():
            for key, value in state.items():
                torch.testing.assert_close(other[name][key], value, rtol=1e-8, atol=1e-9)
