"""The method DINO: what it asks of teacher and student, in which order, and that it learns."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Crops, Progress, Scores, Targets
from dino_lite.losses.prototype import PrototypeLoss, cross_view_pairs
from dino_lite.methods.dino import DINO
from dino_lite.methods.step import Step
from dino_lite.nn.heads import DINOHead
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant, Cosine, Warmup

START = Progress(0, 10, 5)


def tiny_dino(
    *,
    drop_path: float = 0.0,
    batch_norm: bool = False,
    learn_norm: bool = False,
    num_prototypes: int = 24,
    in_chans: int = 3,
    center_momentum: float = 0.9,
    momentum: float = 0.9,
) -> DINO:
    """A DINO of two blocks on crops of 16 and 8 pixels, with weights large enough to matter."""
    backbone = ViT(
        image_size=16,
        patch_size=8,
        in_chans=in_chans,
        embed_dim=16,
        depth=2,
        num_heads=2,
        drop_path=drop_path,
    )
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    head = partial(
        DINOHead,
        num_prototypes=num_prototypes,
        hidden_dim=16,
        bottleneck_dim=8,
        batch_norm=batch_norm,
        learn_norm=learn_norm,
    )
    momentum_schedule = Cosine(momentum, 1.0)
    return DINO(backbone, head, momentum_schedule, Warmup(0.04, 0.07, 0.5), center_momentum)


def random_crops(
    num_images: int = 4, num_local: int = 2, in_chans: int = 3, dtype: torch.dtype = torch.float32
) -> Crops:
    """Noise in the shape of a normalized batch: two global crops of 16 pixels, local ones of 8."""
    small = torch.randn(num_local, num_images, in_chans, 8, 8, dtype=dtype)
    return Crops(
        globals_=torch.randn(2, num_images, in_chans, 16, 16, dtype=dtype),
        locals_=small if num_local else None,
        index=torch.arange(num_images),
        labels=None,
        boxes=torch.zeros(2 + num_local, num_images, 4),
        draws=torch.zeros(2 + num_local, num_images, 9),
    )


def make_step(method: DINO, fused: bool = True, **settings: Any) -> Step:
    """One step of that method as a run would make it: AdamW, one DINO loss, moving rates."""
    groups = param_groups(method.student)
    optimizer = torch.optim.AdamW(groups, fused=fused)
    settings = {
        "learning_rate": Cosine(1e-2, 1e-4, warmup=0.2),
        "weight_decay": Cosine(0.04, 0.4),
        **settings,
    }
    return Step(method, {"dino": PrototypeLoss("cls", Constant(1.0))}, optimizer, **settings)


def logits(scores: Scores) -> Tensor:
    """What a loss sees, detached."""
    return scores.logits().detach()


@pytest.mark.parametrize("num_local", [0, 2])
def test_targets_and_scores_are_the_papers(num_local: int) -> None:
    """Teacher on the global crops, student on all of them, in the order of the crops."""
    method, crops = tiny_dino().double(), random_crops(3, num_local, dtype=torch.float64)
    targets = method.targets(crops, START)
    match = method.compare(crops, targets)["cls"]
    assert isinstance(match.student, Scores)
    assert isinstance(match.target, Targets)
    images = [*crops.globals_, *([] if crops.locals_ is None else crops.locals_)]
    with torch.no_grad():
        student = torch.stack([oracle.logits(method.student, crop) for crop in images])
        teacher = student[:2]  # they are equal at the start
    torch.testing.assert_close(logits(match.student), student, rtol=1e-9, atol=1e-11)
    assert match.student.z.shape == (2 + num_local, 3, 8)
    q = torch.softmax(teacher / 0.04, dim=-1)
    torch.testing.assert_close(match.target.probs(), q, rtol=1e-8, atol=1e-11)
    assert match.target.temp == 0.04
    torch.testing.assert_close(match.target.pairs, cross_view_pairs(2, 2 + num_local))
    torch.testing.assert_close(match.target.weight, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_each_crop_size_meets_the_backbone_once() -> None:
    """One backbone call a crop size and one head call in all, however many crops there are."""
    method, crops = tiny_dino(), random_crops(3, 4)
    seen: list[tuple[int, ...]] = []
    for part in method.student.children():
        part.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    method.compare(crops, method.targets(crops, START))
    assert seen == [(6, 3, 16, 16), (12, 3, 8, 8), (18, 16)]


def test_rows_are_crop_major() -> None:
    """Row (crop, image) of the result is that image of that crop, in every position."""
    method, crops = tiny_dino().double(), random_crops(3, 2, dtype=torch.float64)
    assert crops.locals_ is not None
    with torch.no_grad():
        z = method.student([crops.globals_, crops.locals_])
        for s, group in enumerate([*crops.globals_, *crops.locals_]):
            for image in range(3):
                alone = method.student([group[None, image : image + 1]])
                torch.testing.assert_close(z[s, image], alone[0, 0])


def test_the_teacher_is_the_student_at_step_0() -> None:
    """Backbone and head agree, so the first targets are the student's own answer."""
    method, crops = tiny_dino(drop_path=0.0), random_crops()
    match = method.compare(crops, method.targets(crops, START))["cls"]
    assert isinstance(match.target, Targets)
    assert isinstance(match.student, Scores)
    # Nearly: without slopes attention takes another kernel.
    torch.testing.assert_close(match.target.z, match.student.z[:2].detach())
    teacher = method.ema.module.state_dict()
    assert all(
        torch.equal(value, teacher[name]) for name, value in method.student.state_dict().items()
    )


def test_targets_are_made_without_gradient() -> None:
    """Nothing that the teacher makes remembers how."""
    method, crops = tiny_dino(), random_crops()
    target = method.targets(crops, START)["embedding"]
    assert isinstance(target, Targets)
    assert not any(value.requires_grad for value in target if isinstance(value, Tensor))
    scalars = make_step(method)(crops, START)
    assert not any(value.requires_grad for value in scalars.values())
    assert all(p.grad is None for p in method.teachers.parameters())


def test_the_temperature_follows_its_schedule() -> None:
    """0.04 at the start, 0.07 from half of the run on."""
    method, crops = tiny_dino(), random_crops()
    temps = [
        method.targets(crops, Progress(step, 10, 5))["embedding"].temp for step in (0, 2, 4, 9)
    ]
    assert temps == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_after_a_step_teacher_center_and_count_have_moved() -> None:
    """One call moves all three, and a skipped step only the count."""
    method, crops = tiny_dino(), random_crops()
    method.targets(crops, START)
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.after_step(START, torch.tensor(False))
    changed = {n for n, value in method.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"step"}
    method.after_step(START, torch.tensor(True))
    changed = {n for n, value in method.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"step", "centering.center"} | {
        n for n in before if n.startswith("teachers.")
    }
    assert int(method.step) == 2


def test_a_state_dict_brings_everything_back() -> None:
    """Student, teacher, center and step of a trained method, into a fresh one."""
    method, crops = tiny_dino(), random_crops()
    make_step(method)(crops, START)
    twin = tiny_dino()
    twin.load_state_dict(method.state_dict())
    ours, theirs = (m.targets(crops, START)["embedding"] for m in (method, twin))
    assert torch.equal(ours.probs(), theirs.probs())  # type: ignore[union-attr]
    assert int(twin.step) == 1


def test_the_first_loss_is_near_ln_k() -> None:
    """With many prototypes nobody knows anything at first."""
    torch.manual_seed(0)
    num_prototypes = 20_000
    backbone = ViT(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    head = partial(DINOHead, num_prototypes=num_prototypes, hidden_dim=32, bottleneck_dim=256)
    method = DINO(backbone, head, Constant(0.996), Constant(0.04))
    loss = float(make_step(method)(random_crops(), START)["loss"])
    assert loss == pytest.approx(math.log(num_prototypes), rel=0.15)


@pytest.mark.parametrize("num_local", [0, 3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"batch_norm": True}, {"learn_norm": True}, {"in_chans": 1}],
    ids=["plain", "batch norm", "learned lengths", "gray"],
)
def test_thirty_steps_on_one_batch_lower_the_loss(num_local: int, settings: dict[str, Any]) -> None:
    """Against a teacher that stands still, with and without local crops, in every kind of head."""
    method = tiny_dino(momentum=1.0, center_momentum=1.0, **settings)
    crops = random_crops(4, num_local, settings.get("in_chans", 3))
    step = make_step(method, learning_rate=Constant(3e-3), weight_decay=Constant(0.0))
    losses = [float(step(crops, START)["loss"]) for _ in range(30)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.75 * losses[0]


def disagreement(method: DINO, crops: Crops) -> Tensor:
    """Cross-entropy between the teacher's answers to two crops, of any two images."""
    q = method.targets(crops, Progress(9, 10, 5))["embedding"].probs()  # type: ignore[union-attr]
    return -(q[0][:, None] * q[1].log()).sum(dim=-1)


@pytest.mark.slow
def test_sixty_steps_teach_it_which_crops_are_of_one_image() -> None:
    """From noisy crops of four patterns, without labels: answers to two images drift apart."""
    method, crops, patterns = (
        tiny_dino(batch_norm=True),
        random_crops(4, 3),
        torch.randn(4, 3, 8, 8),
    )
    assert crops.locals_ is not None
    crops = crops._replace(
        globals_=0.3 * crops.globals_ + 2 * patterns.repeat(1, 1, 2, 2),
        locals_=0.3 * crops.locals_ + 2 * patterns,
    )
    step = make_step(method, learning_rate=Constant(1e-3), weight_decay=Constant(0.0))
    gaps = []
    for i in range(61):
        if i % 60 == 0:
            between = disagreement(method, crops)
            gaps.append(float(between.mean() - between.diagonal().mean()))
        step(crops, Progress(i, 62, 62))
    assert gaps[1] > gaps[0] + 2.0


def test_what_moves_is_told_by_name() -> None:
    """Momentum and temperature are logged; the teacher's backbone is what is exported."""
    method = tiny_dino()
    at = Progress(9, 10, 5)
    values = {name: schedule(at) for name, schedule in method.schedules().items()}
    assert values == {"momentum": 1.0, "teacher_temp": 0.07}
    assert method.export_backbone() is method.ema.module.backbone
    assert method.provides == ("embedding", "tokens", "cls")
