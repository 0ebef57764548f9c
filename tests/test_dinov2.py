"""The method DINOv2: masked patches, centerings, KoLeo's tokens, the Gram teacher; parts, ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_lite import distributed
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Anchor, Crops, Match, Progress, Scores, Targets, Tokens, UserError
from dino_lite.losses.gram import GramLoss, regrid
from dino_lite.losses.koleo import KoLeoLoss
from dino_lite.losses.prototype import PrototypeLoss
from dino_lite.methods.dinov2 import DINOv2, Masked
from dino_lite.methods.snapshot import SnapshotTeacher
from dino_lite.methods.step import Step
from dino_lite.nn.centering import EMACentering, SinkhornKnopp
from dino_lite.nn.heads import DINOHead
from dino_lite.nn.masking import BlockMasking
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant, Cosine, Warmup
from ranks import on_ranks
from test_dino import random_crops

MASKING = BlockMasking(sample_prob=0.5, ratio=(0.3, 0.8))
START, LATER = Progress(0, 10, 5), Progress(6, 10, 5)


def tiny_dinov2(
    *,
    masking: BlockMasking | None = MASKING,
    centering: Callable[[int], Any] = SinkhornKnopp,
    separate: bool = True,
    mask_token: bool = True,
    gram_start: float | None = None,
    **backbone: Any,
) -> DINOv2:
    """Two blocks on crops of 16 (patches of 4) and 8 pixels; weights are large enough to matter."""
    network = ViT(
        image_size=16,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mask_token=mask_token,
        **backbone,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    head = partial(DINOHead, num_prototypes=12, hidden_dim=16, bottleneck_dim=8)
    patch_head = partial(DINOHead, num_prototypes=10, hidden_dim=16, bottleneck_dim=8)
    return DINOv2(
        network,
        head,
        Cosine(0.9, 1.0),
        Warmup(0.04, 0.07, 0.5),
        centering,
        masking,
        patch_head if separate else None,
        partial(SnapshotTeacher, start_step=gram_start),
    )


def losses(koleo: float = 0.1, across_ranks: bool = False) -> dict[str, Any]:
    """DINOv2's, and Gram anchoring's."""
    return {
        "dino": PrototypeLoss("cls", Constant(1.0)),
        "ibot": PrototypeLoss("patch", Constant(1.0)),
        "koleo": KoLeoLoss("tokens", Constant(koleo), across_ranks=across_ranks),
        "gram": GramLoss("gram", Constant(2.0)),
    }


def make_step(method: DINOv2, terms: dict[str, Any] | None = None, **settings: Any) -> Step:
    """One step as a run would make it; losses that the method cannot feed are left out."""
    optimizer = torch.optim.AdamW(param_groups(method.student), fused=True)
    settings = {
        "learning_rate": Cosine(1e-2, 1e-4, warmup=0.2),
        "weight_decay": Cosine(0.04, 0.4),
        **settings,
    }
    terms = {n: x for n, x in (terms or losses()).items() if x.reads in method.provides}
    return Step(method, terms, optimizer, **settings)


def images(num: int = 4, num_local: int = 2) -> Crops:
    """Noise in float64."""
    return random_crops(num, num_local, dtype=torch.float64)


# --------------------------------------------------------------------------- who sees what


def test_scores_and_targets_of_masked_patches_are_the_papers() -> None:
    """Each masked patch as the student has it from the masked crop, beside the teacher's from the
    whole one: image by image, in one list.
    """
    method, crops = tiny_dinov2().double(), images(3)
    targets = method.targets(crops, START)
    masked, outputs = targets["patch_embedding"], method.compare(crops, targets)
    assert isinstance(masked, Masked)
    scores, wanted = outputs["patch"]
    assert isinstance(scores, Scores)
    assert isinstance(wanted, Targets)
    mask, row = masked.masks.mask, 0
    assert mask.shape == (2, 3, 16)
    assert mask.any(-1).sum() == 3  # half of the crops
    with torch.no_grad():
        for image in range(3):
            for crop in range(2):
                x, own = crops.globals_[crop, image][None], mask[crop, image][None]
                student = method.student.backbone(x, mask=own).patches[0]
                teacher = method.ema.module.backbone(x).patches[0]
                for patch in own[0].nonzero()[:, 0].tolist():
                    z = method.student.patch_head(student[None, patch])[0]
                    q = method.ema.module.patch_head(teacher[None, patch])[0]
                    torch.testing.assert_close(scores.z[0, row], z)
                    torch.testing.assert_close(wanted.z[0, row], q)
                    share = 1 / own.sum() / 6
                    torch.testing.assert_close(wanted.weight[row], share.double())
                    row += 1
    assert scores.z.shape == (1, row, 8)
    assert wanted.pairs.tolist() == [[1.0]]


def test_what_is_masked_is_hidden_from_the_student_alone() -> None:
    """Other pixels in masked patches change the teacher's answer, and no score of any crop."""
    method, crops = tiny_dinov2().double(), images()
    targets = method.targets(crops, START)
    mask = targets["patch_embedding"].masks.mask  # type: ignore[attr-defined]
    pixels = mask.unflatten(-1, (4, 4)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = crops._replace(
        globals_=torch.where(pixels[:, :, None], 3.0, crops.globals_)  # G n C H W
    )
    before, after = method.compare(crops, targets), method.compare(changed, targets)
    for name in ("cls", "patch"):
        for a, b in ((before[name], after[name]),):
            assert torch.equal(a.student.z, b.student.z)  # type: ignore[union-attr]
    told = method.targets(changed, START)["patch_embedding"].targets  # type: ignore[attr-defined]
    assert not torch.allclose(told.z, targets["patch_embedding"].targets.z)  # type: ignore[attr-defined]


def test_class_tokens_are_matched_as_dino_does() -> None:
    """All pairs of different crops, local ones unmasked, targets with masses as even as can be."""
    method, crops = tiny_dinov2().double(), images(4, 3)
    targets = method.targets(crops, START)
    scores, wanted = method.compare(crops, targets)["cls"]
    assert isinstance(scores, Scores)
    assert isinstance(wanted, Targets)
    assert scores.z.shape == (5, 4, 8)
    assert crops.locals_ is not None
    alone = method.student.head(method.student.backbone(crops.locals_[1]).cls)
    torch.testing.assert_close(scores.z[3], alone)
    torch.testing.assert_close(wanted.probs().sum(-1), torch.ones(2, 4, dtype=torch.float64))
    assert wanted.pairs.sum() == pytest.approx(1.0)


def test_tokens_for_koleo_are_the_students_before_the_head() -> None:
    """Rows are crop-major; the target brings the number of crops and the weights of images."""
    method, crops = tiny_dinov2().double(), images()
    targets = method.targets(crops, START)
    tokens, wanted = method.compare(crops, targets)["tokens"]
    assert isinstance(tokens, Tokens)
    mask = targets["patch_embedding"].masks.mask  # type: ignore[attr-defined]
    alone = method.student.backbone(crops.globals_[1], mask=mask[1])
    torch.testing.assert_close(tokens.cls[4:], alone.cls)
    assert wanted is targets["embedding"]


def test_masks_follow_seed_and_step() -> None:
    """The same step draws the same masks, another one others."""
    method, crops = tiny_dinov2().double(), images()
    masks = []
    for moved in (False, False, True):
        if moved:
            method.after_step(START, torch.tensor(True))
        masks.append(method.targets(crops, START)["patch_embedding"].masks.mask)  # type: ignore[attr-defined]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


# --------------------------------------------------------------------------- what may be left out


def test_one_head_may_serve_both() -> None:
    """Patches then go through the head of class tokens, with a center of their own."""
    method, crops = tiny_dinov2(separate=False, centering=EMACentering).double(), images()
    assert not [name for name, _ in method.named_parameters() if "patch_head" in name]
    targets = method.targets(crops, START)
    scores = method.compare(crops, targets)["patch"].student
    assert isinstance(scores, Scores)
    assert len(scores.prototypes.direction) == 12
    make_step(method)(crops, START)
    centers = method.centering.center, method.patch_centering.center  # type: ignore[union-attr]
    assert not torch.allclose(*centers)


def test_without_masking_there_is_no_patch_objective() -> None:
    """No head for patches, and the last block makes class tokens alone."""
    method, crops = tiny_dinov2(masking=None, mask_token=False).double(), images()
    assert method.provides == ("embedding", "cls", "tokens", "gram")
    outputs = method.compare(crops, method.targets(crops, START))
    assert outputs.keys() == {"embedding", "cls", "tokens"}
    assert outputs["tokens"].student.patches.shape[1] == 0  # type: ignore[union-attr]
    assert not [name for name, _ in method.named_parameters() if "patch_head" in name]
    with pytest.raises(UserError, match="reads 'patch'"):
        Step(
            method,
            losses(),
            torch.optim.SGD(method.student.parameters()),
            learning_rate=Constant(1.0),
            weight_decay=Constant(0.0),
        )


def test_masks_need_a_mask_token() -> None:
    """Said before the run."""
    with pytest.raises(UserError, match=r"backbone\.mask_token=true"):
        tiny_dinov2(mask_token=False)


def test_a_batch_that_is_too_small_for_masks_trains_all_the_same() -> None:
    """One crop in five: none of two."""
    method, crops = tiny_dinov2(masking=BlockMasking(sample_prob=0.2)).double(), images(1)
    step = make_step(method)
    for i in range(2):
        scalars = step(crops, Progress(i, 10, 5))
        assert float(scalars["ibot"]) == 0.0
        assert all(math.isfinite(float(value)) for value in scalars.values())
    assert int(scalars["skipped"]) == 0
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)


# --------------------------------------------------------------------------- Gram anchoring


def test_gram_anchoring_begins_at_its_step() -> None:
    """Nothing before; then the teacher as it was, on whole crops."""
    method, crops = tiny_dinov2(gram_start=0.5).double(), images()
    step = make_step(method)
    for i in range(7):
        scalars = step(crops, Progress(i, 10, 5))
        assert ("gram" in scalars) == (i >= 5)
    assert method.gram is not None
    anchor = method.targets(crops, LATER)["gram"]
    assert isinstance(anchor, Anchor)
    alone = method.gram.module(crops.globals_[1])
    torch.testing.assert_close(anchor.patches[1], alone.patches)
    torch.testing.assert_close(anchor.weight, torch.full((4,), 0.25, dtype=torch.float64))


def test_a_student_that_is_its_anchor_pays_nothing() -> None:
    """Unmasked, at the start of a run that is anchored from its first step."""
    method, crops = tiny_dinov2(masking=None, mask_token=False, gram_start=0.0).double(), images()
    match = method.compare(crops, method.targets(crops, START))["gram"]
    assert float(GramLoss("gram", Constant(1.0))(match).detach()) < 1e-20


def test_the_gram_teacher_looks_at_larger_crops_where_there_are_some() -> None:
    """Extra crops of the same images, on a finer grid."""
    method, crops = tiny_dinov2(gram_start=0.0).double(), images()
    large = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    anchor = method.targets(crops._replace(extra={"gram": large}), START)["gram"]
    assert isinstance(anchor, Anchor)
    assert method.gram is not None
    alone = method.gram.module(large[0])
    assert alone.grid == (8, 8)
    torch.testing.assert_close(anchor.patches[0], regrid(alone.patches, (8, 8), (4, 4)))


def test_without_a_start_there_is_no_gram_teacher() -> None:
    """Nothing is kept in memory for it, and the loss waits for ever."""
    method, crops = tiny_dinov2().double(), images()
    assert list(method.teachers) == ["ema"]
    assert "gram" not in make_step(method)(crops, LATER)


# --------------------------------------------------------------------------- steps


def test_after_a_step_teachers_centers_and_count_have_moved() -> None:
    """One call moves all, and a skipped step only the count."""
    method, crops = tiny_dinov2(centering=EMACentering).double(), images()
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
    assert changed == {"step", "centering.center", "patch_centering.center"} | {
        n for n in before if n.startswith("teachers.")
    }


@pytest.mark.parametrize("centering", [SinkhornKnopp, EMACentering])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_make_the_same_step(centering: Any, micro_batch_size: int) -> None:
    """Losses and all that follows, but for KoLeo, whose neighbors are a micro-batch's."""
    found = []
    for size in (0, micro_batch_size):
        torch.manual_seed(0)
        method = tiny_dinov2(centering=centering, gram_start=0.2).double()
        terms = {n: x for n, x in losses().items() if n != "koleo"}
        step = make_step(method, terms, micro_batch_size=size)
        scalars = [step(images(5), Progress(i, 10, 5)) for i in range(4)]
        found.append((method.state_dict(), scalars[-1]))
    (states, scalars), (others, their) = found[0], found[1]
    assert scalars.keys() == their.keys()
    for name, value in scalars.items():
        torch.testing.assert_close(value, their[name], rtol=1e-9, atol=1e-12)
    for name, value in states.items():
        torch.testing.assert_close(value, others[name], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_forty_steps_on_one_batch_lower_every_loss() -> None:
    """Class tokens, masked patches and the spread of features."""
    method, crops = tiny_dinov2().double(), images(6, 2)
    step = make_step(method, learning_rate=Constant(3e-3), weight_decay=Constant(0.0))
    scalars = [step(crops, Progress(3, 10, 5)) for _ in range(40)]
    for name in ("dino", "ibot", "koleo"):
        assert float(scalars[-1][name]) < float(scalars[0][name]), name


def test_a_state_dict_brings_everything_back() -> None:
    """Student, teachers, centers and step of a trained method, into a fresh one."""
    method, crops = tiny_dinov2(centering=EMACentering, gram_start=0.1).double(), images()
    step = make_step(method)
    for i in range(3):
        step(crops, Progress(i, 10, 5))
    twin = tiny_dinov2(centering=EMACentering, gram_start=0.1).double()
    twin.load_state_dict(method.state_dict())
    ours, theirs = (m.targets(crops, LATER) for m in (method, twin))
    assert torch.equal(ours["embedding"].probs(), theirs["embedding"].probs())  # type: ignore[attr-defined]
    assert torch.equal(ours["gram"].patches, theirs["gram"].patches)  # type: ignore[attr-defined]
    assert torch.equal(
        ours["patch_embedding"].targets.probs(),  # type: ignore[attr-defined]
        theirs["patch_embedding"].targets.probs(),  # type: ignore[attr-defined]
    )


def test_what_moves_is_told_by_name() -> None:
    """Momentum and temperature are logged; the teacher's backbone is what is exported."""
    method = tiny_dinov2()
    assert method.schedules().keys() == {"momentum", "teacher_temp"}
    assert method.export_backbone() is method.ema.module.backbone


# --------------------------------------------------------------------------- two processes

NUM_IMAGES, NUM_STEPS = 6, 3


def train(first: int, last: int, centering: Any, exchange: bool) -> dict[str, Tensor]:
    """Three steps on images first to last of each batch, neighbors among those of all ranks."""
    torch.manual_seed(1)
    method = tiny_dinov2(centering=centering, gram_start=0.3).double()
    seen: list[Tensor] = []

    trained = [p for p in method.student.parameters() if p.requires_grad]

    def backward(total: Tensor) -> None:
        total.backward()
        if exchange:
            for parameter in trained:
                assert parameter.grad is not None
                distributed.all_reduce_mean_(parameter.grad)

    step = make_step(method, losses(across_ranks=True), clip=0.1, backward=backward)

    def watch(outputs: dict[str, Match]) -> None:
        seen.append(outputs["patch"].target.weight)  # type: ignore[union-attr]

    scalars = []
    for i in range(NUM_STEPS):
        torch.manual_seed(100 + i)
        crops = images(NUM_IMAGES).part(first, last)
        scalars.append(step(crops, Progress(i, NUM_STEPS + 1, 1), watch)["loss"])
    return {**method.state_dict(), "losses": torch.stack(scalars), "shares": torch.cat(seen)}


def half(rank: int) -> dict[str, dict[str, Tensor]]:
    """One of two processes: half of each batch, which have different numbers of masked patches."""
    first, last = rank * NUM_IMAGES // 2, (rank + 1) * NUM_IMAGES // 2
    return {
        centering.__name__: train(first, last, centering, exchange=True)
        for centering in (SinkhornKnopp, EMACentering)
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What two gloo processes found."""
    return on_ranks(2, half)


@pytest.mark.parametrize("centering", [SinkhornKnopp, EMACentering])
def test_two_processes_make_the_steps_of_one(ranks: list[dict[str, Any]], centering: Any) -> None:
    """Masks, Sinkhorn-Knopp, centers, KoLeo across ranks, both teachers and the student."""
    alone = train(0, NUM_IMAGES, centering, exchange=False)
    for found in ranks:
        own = found[centering.__name__]
        for name, value in alone.items():
            if name not in ("losses", "shares"):
                torch.testing.assert_close(own[name], value, rtol=1e-6, atol=1e-8, msg=name)
    both = [found[centering.__name__] for found in ranks]
    torch.testing.assert_close((both[0]["losses"] + both[1]["losses"]) / 2, alone["losses"])
    assert len(both[0]["shares"]) != len(both[1]["shares"])  # else they prove less
    assert len(both[0]["shares"]) + len(both[1]["shares"]) == len(alone["shares"])
