"""The method of distillation: losses, students, the queue, mixup; parts and ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_lite import distributed
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, Match, Progress, UserError
from dino_lite.data.photometric import Normalize
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.formats.head_weights import head_of
from dino_lite.losses.gram import regrid
from dino_lite.losses.koleo import KoLeoLoss
from dino_lite.losses.prototype import PrototypeLoss
from dino_lite.losses.similarity import PatchSimilarityLoss, Queued, QueueLoss
from dino_lite.losses.tokens import Rows, TokenLoss
from dino_lite.methods.distillation import Distillation
from dino_lite.methods.frozen import FrozenTeacher, Network
from dino_lite.methods.step import Step
from dino_lite.methods.student import mixed
from dino_lite.nn import batch_norm as distributed_norm
from dino_lite.nn.centering import SinkhornKnopp
from dino_lite.nn.heads import DINOHead
from dino_lite.nn.masking import BlockMasking
from dino_lite.nn.teachers import EMATeacher
from dino_lite.optim.param_groups import groups_of_students
from dino_lite.optim.schedules import Constant, Cosine
from oracle import kl_of_cosines, token_distance
from ranks import on_ranks
from test_dino import random_crops

START = Progress(0, 10, 5)
LOSSES = {
    "dino": PrototypeLoss("cls", Constant(1.0)),
    "ibot": PrototypeLoss("patch", Constant(1.0)),
    "koleo": KoLeoLoss("tokens", Constant(0.1), across_ranks=True),
    "cls_token": TokenLoss("cls_token", Constant(1.0)),
    "patch_tokens": TokenLoss("patch_tokens", Constant(1.0)),
    "masked_tokens": TokenLoss("masked_tokens", Constant(1.0)),
    "cls_similarity": QueueLoss("cls_similarity", Constant(1.0)),
    "patch_similarity": PatchSimilarityLoss("patch_similarity", Constant(1.0)),
}


def vit(width: int, patch: int = 4, mask_token: bool = False) -> ViT:
    """One block on crops of 16 pixels."""
    sizes = {"embed_dim": width, "depth": 1, "num_heads": 2, "patch_size": patch}
    return ViT(image_size=16, mask_token=mask_token, **sizes)


def convnet() -> ConvNet:
    """With batch normalization, and a class token that is wider than its patches."""
    return ConvNet(widths=[8, 16], depths=[1, 1], fields=1, patch_size=4)


def frozen(backbone: Backbone | None = None, heads: bool = True) -> FrozenTeacher:
    """A teacher of width 24 with patches of 8 pixels, and heads of two sizes."""
    torch.manual_seed(1)
    network = backbone or vit(24, 8)
    width = network.embed_dim
    both = {
        "head": DINOHead(width, 12, hidden_dim=16, bottleneck_dim=6),
        "patch_head": DINOHead(width, 10, hidden_dim=16, bottleneck_dim=6),
    }
    how = Preprocessing((16, 16), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    found = Network(network, how, both if heads else {})
    return FrozenTeacher("TEACHER", "0" * 16, lambda: found, Normalize())


def distillation(
    students: dict[str, Backbone] | None = None,
    *losses: str,
    teacher: FrozenTeacher | None = None,
    **settings: Any,
) -> Distillation:
    """A ViT and a ConvNet, for the losses of these names, or for all."""
    torch.manual_seed(0)
    reads = [LOSSES[name].reads for name in losses or LOSSES]
    return Distillation(
        students or {"vit": vit(16, mask_token=True), "conv": convnet()},
        partial(DINOHead, hidden_dim=16, bottleneck_dim=8, plain=True),
        Cosine(0.9, 1.0),
        Constant(0.07),
        SinkhornKnopp,
        BlockMasking(sample_prob=0.5, ratio=(0.3, 0.8)),
        queue_size=10,
        teacher=teacher or frozen(),
        reads=reads,
        **settings,
    )


def step_of(method: Distillation, **settings: Any) -> Step:
    """A step with every loss that some student has a match for."""
    losses = {name: loss for name, loss in LOSSES.items() if loss.reads in method.reads}
    scales = dict.fromkeys(method.student, 1.0)
    optimizer = torch.optim.SGD(groups_of_students(method.student, scales), lr=0.1)
    rates = {"learning_rate": Constant(0.1), "weight_decay": Constant(0.0)}
    return Step(method, losses, optimizer, **rates, clip=0.0, **settings)


def test_token_loss_is_the_mean_squared_difference_of_each_row_by_its_weight() -> None:
    """Rows of class tokens, and matrices of patches."""
    for shape in ((5, 7), (5, 3, 7)):
        student, teacher = torch.randn(2, *shape, dtype=torch.float64)
        weight = torch.rand(5, dtype=torch.float64)
        found = LOSSES["cls_token"](Match(student, Rows(teacher, weight)))
        torch.testing.assert_close(found, token_distance(student, teacher, weight))


def test_queue_loss_is_the_divergence_of_the_softmax_over_the_filled_queue() -> None:
    """Rows that are not filled yet have no part in it."""
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64)
    queue = torch.nn.functional.normalize(torch.randn(9, 6, dtype=torch.float64), dim=-1)
    weight = torch.rand(4, dtype=torch.float64)
    for filled in (1, 5, 9):
        bank = queue.clone()
        bank[filled:] = 0
        target = Queued(Rows(teacher, weight), bank, torch.tensor(filled))
        rows = student.clone().requires_grad_()
        found = LOSSES["cls_similarity"](Match(rows, target))
        found.backward()
        known = (queue[:filled], queue[:filled])
        wanted = sum(
            float(w) * kl_of_cosines(s, t, known, 0.07)
            for s, t, w in zip(student, teacher, weight, strict=True)
        )
        assert float(found.detach()) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        assert rows.grad is not None
        assert rows.grad.isfinite().all()


def test_patch_similarity_loss_compares_the_similarities_within_a_crop() -> None:
    """The widths of both may differ."""
    student = torch.randn(3, 4, 5, dtype=torch.float64)
    teacher = torch.randn(3, 4, 8, dtype=torch.float64)
    weight = torch.rand(3, dtype=torch.float64)
    wanted = sum(
        float(w) * sum(kl_of_cosines(s[i], t[i], (s, t), 0.07) for i in range(4)) / 4
        for s, t, w in zip(student, teacher, weight, strict=True)
    )
    found = LOSSES["patch_similarity"](Match(student, Rows(teacher, weight)))
    assert float(found) == pytest.approx(wanted, rel=1e-9)


def test_a_student_is_compared_with_what_the_teacher_makes_of_the_same_crops() -> None:
    """Patches on the student's grid; the pixels normalized as the teacher was trained; local crops
    by class tokens; every weight has a gradient.
    """
    method, crops = distillation(None, "cls_token", "patch_tokens", "masked_tokens"), random_crops()
    found = method.compare(crops, method.targets(crops, START))
    how, teacher = method.teacher.network.preprocessing, method.teacher.network.backbone
    usual = Normalize()
    pixels = crops.globals_.flatten(0, 1) * usual.std[:, None, None] + usual.mean[:, None, None]
    mean, std = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))
    tokens = teacher(((pixels - mean) / std).float())
    for name in ("vit", "conv"):
        target: Any = found[f"{name}/patch_tokens"].target
        torch.testing.assert_close(target.values, regrid(tokens.patches, (2, 2), (4, 4)))
        assert float(target.weight.sum()) == pytest.approx(1.0)
        of_cls: Any = found[f"{name}/cls_token"].target
        torch.testing.assert_close(of_cls.values[: len(tokens.cls)], tokens.cls)
        assert len(of_cls.values) == len(crops.boxes) * crops.num_images
        assert float(of_cls.weight.sum()) == pytest.approx(1.0)
    assert "conv/masked_tokens" not in found  # it has no mask token
    terms = [LOSSES[key.partition("/")[2]](match) for key, match in found.items()]
    torch.stack(terms).sum().backward()
    assert all(p.grad is not None for p in method.student.parameters())


@pytest.mark.parametrize(
    ("losses", "heads"),
    [
        (("cls_token",), {"cls_token"}),
        (("masked_tokens", "cls_similarity"), {"masked_tokens", "cls_similarity"}),
        (("dino", "ibot", "koleo"), {"cls", "patch"}),
    ],
)
def test_a_student_has_the_heads_that_losses_read(losses: tuple[str, ...], heads: set[str]) -> None:
    """A head without a loss would never have a gradient."""
    masks = bool({"masked_tokens", "ibot"} & {*losses})  # as planned
    method = distillation({"vit": vit(16, mask_token=masks), "conv": convnet()}, *losses)
    students: Any = method.student
    assert set(students["vit"].heads) == heads
    assert set(students["conv"].heads) == heads - {"patch", "masked_tokens"}
    crops = random_crops()
    found = method.compare(crops, method.targets(crops, START))
    of_match = {loss.reads: loss for loss in LOSSES.values()}
    terms = [of_match[key.partition("/")[2]](match) for key, match in found.items()]
    torch.stack(terms).sum().backward()
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)


def test_prototypes_of_a_teacher_without_heads_are_refused() -> None:
    """In one sentence, with an objective that needs none."""
    with pytest.raises(UserError, match=r"teacher=TEACHER has no projection head.*cls_token"):
        distillation(None, "dino", teacher=frozen(heads=False))
    with pytest.raises(UserError, match="has no projection head"):
        distillation(None, "ibot", teacher=frozen(heads=False))


def test_crops_that_are_no_whole_patches_of_the_teacher_are_resized_for_it() -> None:
    """Patches of 7 pixels, as of 14 in DINOv2, on crops of 16."""
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 7}
    teacher = frozen(ViT(image_size=21, **sizes))
    method, crops = distillation(None, "patch_tokens", teacher=teacher), random_crops()
    target: Any = method.compare(crops, method.targets(crops, START))["vit/patch_tokens"].target
    assert target.values.shape[1:] == (16, 24)
    assert method.targets(crops, START)["taught"].grid == (3, 3)  # type: ignore[attr-defined]


def test_the_teacher_sees_larger_crops_where_there_are_some() -> None:
    """Its patches are resampled to the student's grid."""
    method, crops = distillation(None, "patch_tokens"), random_crops()
    larger = torch.randn(*crops.globals_.shape[:3], 32, 32)
    targets: Any = method.targets(crops._replace(extra={"gram": larger}), START)
    assert targets["taught"].grid == (4, 4)


def test_one_of_several_students_trains_as_it_does_alone() -> None:
    """Gradients, clipping and updates of one do not depend on the others; so does its average,
    batch statistics included.
    """
    both = distillation({"a": vit(16), "b": convnet()}, "cls_token", "patch_similarity")
    alone = distillation({"b": convnet()}, "cls_token", "patch_similarity")
    alone.student["b"].load_state_dict(both.student["b"].state_dict())
    alone.teachers.load_state_dict(
        {k: v for k, v in both.teachers.state_dict().items() if ".b." in k}
    )
    for number in range(2):
        crops = random_crops()
        scalars = [
            step_of(method, clip_by="module")(crops, Progress(number, 10, 5))
            for method in (both, alone)
        ]
        torch.testing.assert_close(scalars[0]["b/loss"], scalars[1]["loss"])
        total = scalars[0]["a/loss"] + scalars[0]["b/loss"]
        torch.testing.assert_close(scalars[0]["loss"], total)
    for mine, its in zip(
        both.ema.module["b"].state_dict().values(),
        alone.ema.module["b"].state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(mine, its)


def test_an_average_with_buffers_averages_batch_statistics() -> None:
    """It never runs in training, so it has none of its own."""
    student = convnet()
    teacher = EMATeacher(student, Constant(0.75), buffers=True)
    name = next(n for n, b in student.named_buffers() if n.endswith("running_mean"))
    student.get_buffer(name).add_(4.0)
    teacher.after_step(student, START, torch.tensor(True))
    torch.testing.assert_close(
        teacher.module.get_buffer(name), student.get_buffer(name) - 4.0 + 0.25 * 4.0
    )
    teacher.after_step(student, START, torch.tensor(False))  # a skipped step
    torch.testing.assert_close(teacher.module.get_buffer(name), student.get_buffer(name) - 3.0)


def test_mixup_mixes_pairs_of_neighbors_with_a_share_of_seed_and_step() -> None:
    """Teacher and students see the same; the last of an odd batch stays as it is."""
    crops = random_crops()
    odd = crops.part(0, 3)
    found = mixed(odd, 0.25)
    a, b, c = odd.globals_.unbind(1)
    wanted = torch.stack([0.25 * a + 0.75 * b, 0.25 * b + 0.75 * a, c], 1)
    torch.testing.assert_close(found.globals_, wanted)
    method = distillation(None, "cls_token", mixup=True)
    first: Any = method.targets(crops, START)["mixed"]
    again: Any = distillation(None, "cls_token", mixup=True).targets(crops, START)["mixed"]
    assert torch.equal(first.globals_, again.globals_)
    method.after_step(START, torch.tensor(True))
    later: Any = method.targets(crops, START)["mixed"]
    assert not torch.equal(first.globals_, later.globals_)


def test_the_queue_holds_the_latest_class_tokens_of_the_teacher() -> None:
    """Newest first; a step with a gradient that is not finite leaves it as it was."""
    method = distillation(None, "cls_similarity")
    seen: list[Tensor] = []
    for _ in range(3):
        crops = random_crops()
        step_of(method)(crops, START)
        tokens = method.teacher(crops.globals_[0], cls_only=True).cls
        seen.insert(0, torch.nn.functional.normalize(tokens, dim=-1))
    torch.testing.assert_close(method.queue, torch.cat(seen)[:10])
    assert int(method.queued) == 10
    before = method.queue.clone()
    broken = random_crops()
    broken.globals_[0, 0] = torch.nan
    scalars = step_of(method)(broken, START)
    assert float(scalars["skipped"]) == 1
    assert torch.equal(method.queue, before)


NUM_IMAGES = 8


def trained(first: int, last: int, exchange: bool) -> dict[str, Tensor]:
    """The state after three steps on images first to last of each batch, in float64."""
    torch.manual_seed(0)
    students = {"vit": vit(16, mask_token=True), "other": vit(8, 8, True), "conv": convnet()}
    method = distillation(students, mixup=True).double()
    distributed_norm.across_ranks(method)

    def backward(total: Tensor) -> None:
        total.backward()
        for parameter in method.student.parameters() if exchange else ():
            if parameter.requires_grad:
                assert parameter.grad is not None
                distributed.all_reduce_mean_(parameter.grad)

    step = step_of(method, backward=backward)
    for number in range(3):
        torch.manual_seed(number)
        crops = random_crops(NUM_IMAGES, dtype=torch.float64).part(first, last)
        step(crops, Progress(number, 10, 5))
    return {**method.state_dict()}


def half(rank: int) -> dict[str, Tensor]:
    """One of two processes: half of each batch."""
    return trained(rank * NUM_IMAGES // 2, (rank + 1) * NUM_IMAGES // 2, exchange=True)


def test_two_processes_make_the_steps_of_one() -> None:
    """All objectives, three students, masks, the queue, mixup and batch normalization."""
    alone = trained(0, NUM_IMAGES, exchange=False)
    for found in on_ranks(2, half):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8, msg=name)


def test_heads_in_a_file_are_those_that_were_saved() -> None:
    """Of every kind: one layer or several, batch normalization, plain prototypes, none."""
    for settings in (
        {},
        {"plain": True},
        {"num_layers": 1},
        {"batch_norm": True, "num_layers": 2},
        {"num_prototypes": 0},
    ):
        head = DINOHead(
            6, **({"num_prototypes": 5, "hidden_dim": 7, "bottleneck_dim": 4} | settings)
        )
        read = head_of(head.state_dict(), "teacher=FILE").eval()
        rows = torch.randn(3, 6)
        torch.testing.assert_close(read(rows), head.eval()(rows))
        torch.testing.assert_close(read.prototypes().rows(), head.prototypes().rows())
