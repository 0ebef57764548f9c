"""What the cost of a step depends on: numbers read of a planned configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from dino_lite.backbones.blocks import computed_part
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.transformer import Transformer
from dino_lite.config import Config, instantiate
from dino_lite.contracts import Memory
from dino_lite.methods.dino import DINO
from dino_lite.methods.dinov2 import DINOv2
from dino_lite.methods.snapshot import SnapshotTeacher
from dino_lite.nn.centering import EMACentering, SinkhornKnopp
from dino_lite.nn.heads import DINOHead
from dino_lite.nn.masking import BlockMasking


class Group(NamedTuple):
    """Crops of one size: how many of an image, and tokens and pixel values of one."""

    num_crops: int
    num_tokens: int
    num_values: int
    whole: bool = False  # the student's last block is computed for all tokens, not the class's


class Head(NamedTuple):
    """What goes through one of the heads: class tokens, or masked patches."""

    widths: tuple[int, ...]  # from the backbone's to the bottleneck
    num_prototypes: int
    students: int  # S rows of an item, each compared
    teachers: int  # with T
    items: float = 1.0  # of an image: itself, or its masked patches
    balances: int = 0  # rounds of Sinkhorn-Knopp

    @property
    def entries(self) -> int:
        """Of the prototypes, K times E."""
        return self.num_prototypes * self.widths[-1]


class Anchored(NamedTuple):
    """Gram anchoring: the crops that its teacher sees and whether they are others than the global
    ones, patches of a student's, weights of the teacher, and for which part of the run it teaches.
    """

    crops: Group
    own_crops: bool
    num_patches: int
    num_weights: int
    share: float


class Sizes(NamedTuple):
    """What the formulas read of a configuration; images are those of one rank."""

    num_images: int
    micro_batch_size: int
    groups: tuple[Group, ...]  # global crops first
    width: int
    depth: int
    num_heads: int  # of attention
    hidden: int  # of a block's MLP, before its last layer
    block_weights: int  # of the layers of a block
    last_weights: int  # of the last one of them
    heads: tuple[Head, ...]  # projection heads, of class tokens first
    num_student: int  # weights, all
    num_entries: int  # of them those of prototypes
    num_trained: int
    num_teacher: int  # of all teachers
    num_tensors: int  # that are trained
    wide_bytes: int  # of a weight
    float_bytes: int  # of a float that is kept in the run's precision
    on_cpu: bool
    memory: Memory
    layer_scale: bool = False
    rotates: bool = False  # queries and keys
    student_part: float = 1.0  # of a block's work, that stochastic depth leaves
    teacher_whole: bool = False  # the teacher's last block is computed for all tokens
    anchored: Anchored | None = None


_METHODS = ("dino_lite.methods.dino.DINO", "dino_lite.methods.dinov2.DINOv2")
_BACKBONES = ("dino_lite.backbones.vit.ViT", "dino_lite.backbones.rope.RoPEViT")


def sizes(config: Config) -> Sizes | None:
    """Read a planned configuration; None where it is not one of our methods with one of our vision
    transformers and with parts of ours, whose cost is known.

    The network is built without storage, for its numbers only.
    """
    if (
        config["method"]["_target_"] not in _METHODS
        or config["backbone"]["_target_"] not in _BACKBONES
    ):
        return None  # code of others need not build on torch's meta device
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        backbone = instantiate({k: v for k, v in config["backbone"].items() if k != "pretrained"})
        method = instantiate(config["method"])(backbone=backbone)
    assert isinstance(backbone, Transformer)
    assert isinstance(method, DINO | DINOv2)
    if not _is_ours(method):
        return None
    trainer, augment = config["trainer"], config["augment"]
    ranks = trainer["devices"] * trainer["num_nodes"]
    num_images = max(1, config["loader"]["batch_size"] // ranks)
    masks = isinstance(method, DINOv2) and method.masking is not None
    gram = method.gram if isinstance(method, DINOv2) else None
    large = _group(backbone, 2, augment["global_size"], masks or gram is not None)
    small = _group(backbone, augment["num_local"], augment["local_size"])
    num_patches = large.num_tokens - 1 - backbone.num_registers
    student = list(method.student.parameters())
    trained = [weight for weight in student if weight.requires_grad]
    num_student, precision = sum(weight.numel() for weight in student), str(trainer["precision"])
    block: Any = backbone.blocks[0]
    layers, mlp = (_layers(part) for part in (block, block.mlp))
    heads = _heads(method, large.num_crops, large.num_crops + small.num_crops, num_patches)
    shared = isinstance(method, DINOv2) and method.student.patch_head is None
    return Sizes(
        num_images=num_images,
        micro_batch_size=min(trainer["micro_batch_size"] or num_images, num_images),
        groups=tuple(group for group in (large, small) if group.num_crops),
        width=backbone.embed_dim,
        depth=len(backbone.blocks),
        num_heads=block.attn.num_heads,
        hidden=sum(len(layer.weight) for layer in mlp[:-1]),
        block_weights=sum(layer.weight.numel() for layer in layers),
        last_weights=mlp[-1].weight.numel(),
        heads=heads,
        num_student=num_student,
        num_entries=sum(head.entries for head in (heads[:1] if shared else heads)),
        num_trained=sum(weight.numel() for weight in trained),
        num_teacher=sum(weight.numel() for weight in method.parameters()) - num_student,
        num_tensors=len(trained),
        wide_bytes=8 if precision == "64" else 4,
        float_bytes={"64": 8, "bf16": 2}.get(precision, 4),
        on_cpu=trainer["accelerator"] == "cpu",
        memory=trainer["memory"],
        layer_scale=not isinstance(block.ls1, nn.Identity),
        rotates=isinstance(backbone, RoPEViT),
        student_part=computed_part(backbone, trainer["compile"]),
        teacher_whole=masks,
        anchored=None if gram is None else _anchored(backbone, gram, augment, num_patches),
    )


def _is_ours(method: DINO | DINOv2) -> bool:
    """Whether what a configuration may replace is what stands in conf/."""
    parts: list[Any] = [(method.student.head, DINOHead)]
    parts.append((method.centering, EMACentering | SinkhornKnopp))
    if isinstance(method, DINOv2):
        parts.append((method.student.of_patches, DINOHead))
        parts.append((method.patch_centering, EMACentering | SinkhornKnopp | None))
        parts.append((method.masking, BlockMasking | None))
        parts.append((method.gram, SnapshotTeacher | None))
    return all(isinstance(part, kinds) for part, kinds in parts)


def _group(backbone: Transformer, num_crops: int, side: int, whole: bool = False) -> Group:
    """Crops of `side` pixels."""
    num_patches = (side // backbone.patch_size) ** 2
    num_tokens = num_patches + 1 + backbone.num_registers
    return Group(num_crops, num_tokens, backbone.in_chans * side**2, whole)


def _anchored(
    backbone: Transformer, gram: SnapshotTeacher, augment: Config, num_patches: int
) -> Anchored:
    start, own = gram.start_step, augment["gram_size"]
    return Anchored(
        _group(backbone, 2, own or augment["global_size"]),
        own is not None,
        num_patches,
        sum(weight.numel() for weight in gram.parameters()),
        1.0 if start is None or isinstance(start, str) else 1.0 - start,  # steps, epochs: all of it
    )


def _heads(method: Any, num_teacher: int, num_student: int, num_patches: int) -> tuple[Head, ...]:
    """Of class tokens and, where some are masked, of patches."""
    heads = [_head(method.student.head, method.centering, num_student, num_teacher)]
    masking = getattr(method, "masking", None)
    if masking is not None:
        masked = num_teacher * masking.mean_masked(num_patches)
        heads.append(_head(method.student.of_patches, method.patch_centering, 1, 1, masked))
    return tuple(heads)


def _head(
    head: DINOHead, centering: nn.Module, students: int, teachers: int, items: float = 1.0
) -> Head:
    layers = _layers(head.mlp)
    widths = (layers[0].in_features, *(len(layer.weight) for layer in layers))
    balances = centering.num_iterations if isinstance(centering, SinkhornKnopp) else 0
    return Head(widths, head.num_prototypes, students, teachers, items, balances)


def _layers(module: nn.Module) -> list[Any]:
    """Its layers that are products, in order."""
    return [part for part in module.modules() if hasattr(part, "in_features")]
