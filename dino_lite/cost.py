"""What an optimizer step costs, from a planned configuration alone: products, bytes that are moved,
memory. Nothing is allocated and nothing is run.

Every constant that belongs to how the step is written stands in `BLOCK`, `LOSS` and `WEIGHTS`.
"""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

import torch
from torch import nn

from dino_lite.backbones.blocks import Memory, computed_part
from dino_lite.backbones.vit import ViT
from dino_lite.config import Config, instantiate
from dino_lite.contracts import LOGITS_BYTES
from dino_lite.methods.dino import DINO


class Block(NamedTuple):
    """How a transformer block is computed. Floats are those of a token: D its width, H the hidden
    width of its MLP (of both halves, where one is the gate), h heads, N tokens of a crop.
    """

    # kept for the backward pass: 2·D in the weights' precision (what both norms take in) and, in
    # the run's, 6·D (what both norms give, queries, keys, values, attention) + H (before GELU; and
    # after it, where memory is high) + 0·h·N (attention weights, which a fused kernel does not
    # keep) + 2·D (what LayerScale takes in); where memory is low, what the block takes in alone
    kept_wide: float = 2.0
    kept_width: float = 6.0
    kept_hidden: float = 1.0
    kept_hidden_high: float = 2.0
    kept_scores: float = 0.0
    kept_layer_scale: float = 2.0
    # alive at once while a block is computed without gradient, and beside the kept while it is
    # gone through backward (slopes of what is at hand)
    forward_width: float = 3.0
    forward_hidden: float = 2.0
    backward_width: float = 2.0
    backward_hidden: float = 2.0
    # read and written outside products: norms, sums, GELU, biases' gradients
    moved_forward: tuple[float, float] = (10.0, 2.0)  # times D, times H
    moved_backward: tuple[float, float] = (17.0, 4.0)
    moved_layer_scale: tuple[float, float] = (4.0, 10.0)  # forward, backward; times D
    attention_backward: float = 2.5  # of forward: the fused kernel makes its weights again
    class_token_last: bool = True  # the last block: keys and values of all, the rest of one
    calls_forward: float = 14.0  # operations handed to the device
    calls_backward: float = 30.0


class Loss(NamedTuple):
    """How prototypes and the cross-entropy are computed, for a row of S student or T teacher."""

    student_products: float = 3.0  # logits, slope of z, slope of the prototypes
    teacher_products: float = 4.0  # logits for centering and again for the loss, both slopes
    student_moved: float = 9.0  # floats a logit, read and written
    teacher_moved: float = 14.0
    prototypes_moved: float = 12.0  # floats an entry: norms of both, slopes through them


class Weights(NamedTuple):
    """What follows a gradient, in floats a weight that are read and written."""

    update: float = 7.0  # AdamW: weight, gradient, two moments; three of them written
    average: float = 3.0  # the teacher
    clip: float = 3.0
    calls: float = 10.0  # a tensor, where the device has no call for many at once
    other_calls: float = 200.0  # the head, the loss, the rest of a step


BLOCK, LOSS, WEIGHTS = Block(), Loss(), Weights()


class Group(NamedTuple):
    """Crops of one size: how many of an image, and tokens and pixel values of one."""

    num_crops: int
    num_tokens: int
    num_values: int


class Sizes(NamedTuple):
    """What the formulas read of a configuration; images are those of one rank."""

    num_images: int
    micro_batch_size: int
    groups: tuple[Group, ...]  # global crops first
    width: int
    depth: int
    num_heads: int
    hidden: int  # of a block's MLP, before its last layer
    block_weights: int  # of the layers of a block
    head: tuple[int, ...]  # widths, from the backbone's to the bottleneck
    num_prototypes: int
    num_student: int  # weights, all
    num_trained: int  # of them
    num_teacher: int
    num_tensors: int  # that are trained
    wide_bytes: int  # of a weight
    float_bytes: int  # of a float that is kept in the run's precision
    on_cpu: bool
    memory: Memory
    layer_scale: bool = False
    student_part: float = 1.0  # of a block's work, that stochastic depth leaves

    @property
    def num_teacher_crops(self) -> int:
        """T."""
        return self.groups[0].num_crops

    @property
    def num_student_crops(self) -> int:
        """S."""
        return sum(group.num_crops for group in self.groups)


class Work(NamedTuple):
    """Of one step of one rank: FLOPs by the kind of product, bytes outside them, operations."""

    linear: float  # products of layers, in the run's precision
    attention: float
    prototypes: float  # in at least float32
    moved: float
    calls: float

    @property
    def flops(self) -> float:
        """All products."""
        return self.linear + self.attention + self.prototypes


_KNOWN = ("dino_lite.methods.dino.DINO", "dino_lite.backbones.build.vit")


def sizes(config: Config) -> Sizes | None:
    """Read a planned configuration; None where it is not DINO of a ViT, whose cost is known.

    The network is built without storage, for its numbers only.
    """
    if (config["method"]["_target_"], config["backbone"]["_target_"]) != _KNOWN:
        return None  # code of others need not build on torch's meta device
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        backbone = instantiate(config["backbone"] | {"pretrained": None})
        method = instantiate(config["method"])(backbone=backbone)
    assert isinstance(method, DINO)
    assert isinstance(backbone, ViT)
    trainer, augment = config["trainer"], config["augment"]
    patch, channels = backbone.patch_size, backbone.in_chans
    crops = [(2, augment["global_size"]), (augment["num_local"], augment["local_size"])]
    ranks = trainer["devices"] * trainer["num_nodes"]
    num_images = max(1, config["loader"]["batch_size"] // ranks)
    student = list(method.student.parameters())
    trained = [weight for weight in student if weight.requires_grad]
    num_student, precision = sum(weight.numel() for weight in student), str(trainer["precision"])
    block: Any = backbone.blocks[0]
    layers, mlp, head = (_linears(part) for part in (block, block.mlp, method.student.head.mlp))
    return Sizes(
        num_images=num_images,
        micro_batch_size=min(trainer["micro_batch_size"] or num_images, num_images),
        groups=tuple(
            Group(num, (size // patch) ** 2 + 1 + backbone.num_registers, channels * size**2)
            for num, size in crops
            if num
        ),
        width=backbone.embed_dim,
        depth=len(backbone.blocks),
        num_heads=block.attn.num_heads,
        hidden=sum(layer.out_features for layer in mlp[:-1]),
        block_weights=sum(layer.weight.numel() for layer in layers),
        head=(head[0].in_features, *(layer.out_features for layer in head)),
        num_prototypes=method.student.head.num_prototypes,
        num_student=num_student,
        num_trained=sum(weight.numel() for weight in trained),
        num_teacher=sum(weight.numel() for weight in method.parameters()) - num_student,
        num_tensors=len(trained),
        wide_bytes=8 if precision == "64" else 4,
        float_bytes={"64": 8, "bf16": 2}.get(precision, 4),
        on_cpu=trainer["accelerator"] == "cpu",
        memory=trainer["memory"],
        layer_scale=not isinstance(block.ls1, nn.Identity),
        student_part=computed_part(backbone, trainer["compile"]),
    )


def _linears(module: nn.Module) -> list[nn.Linear]:
    """Its layers that are products, in order."""
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def work(size: Sizes) -> Work:
    """Of one optimizer step. Left out: resampled positions, norms' and losses' own arithmetic."""
    linear = attention = moved = calls = 0.0
    scales = BLOCK.moved_layer_scale if size.layer_scale else (0.0, 0.0)
    for group in size.groups:
        taught, done = group is size.groups[0], size.student_part
        crops, tokens = size.num_images * group.num_crops, group.num_tokens
        # The patches' product has no slope of the pixels.
        stem = 2.0 * group.num_values * size.width
        layers, scores = _block_flops(size, tokens)
        linear += crops * (stem * (2 + taught) + layers * (3 * done + taught))
        attention += crops * scores * ((1 + BLOCK.attention_backward) * done + taught)
        forward, backward = (
            size.depth * tokens * ((part[0] + scale) * size.width + part[1] * size.hidden)
            for part, scale in zip((BLOCK.moved_forward, BLOCK.moved_backward), scales, strict=True)
        )
        moved += crops * (forward * (done + taught) + backward * done) * size.float_bytes
        passes = ceil(size.num_images / size.micro_batch_size)
        calls += passes * size.depth * (BLOCK.calls_forward + BLOCK.calls_backward)
        calls += taught * size.depth * BLOCK.calls_forward
    students = size.num_images * size.num_student_crops
    teachers = size.num_images * size.num_teacher_crops
    head = 2.0 * sum(a * b for a, b in zip(size.head, size.head[1:], strict=False))
    linear += head * (3 * students + teachers)
    products = LOSS.student_products * students + LOSS.teacher_products * teachers
    logits = LOSS.student_moved * students + LOSS.teacher_moved * teachers
    entries = size.num_prototypes * size.head[-1]
    floats = logits * size.num_prototypes + LOSS.prototypes_moved * entries
    floats += (WEIGHTS.update + WEIGHTS.clip) * size.num_trained
    floats += WEIGHTS.average * size.num_teacher
    calls += WEIGHTS.other_calls + size.on_cpu * WEIGHTS.calls * size.num_tensors
    return Work(
        linear, attention, 2.0 * products * entries, moved + floats * size.wide_bytes, calls
    )


def _block_flops(size: Sizes, tokens: int) -> tuple[float, float]:
    """Forward FLOPs of all blocks for one crop: of the layers, and of attention."""
    layers, scores = 2.0 * tokens * size.block_weights, 4.0 * tokens**2 * size.width
    if not BLOCK.class_token_last:
        return size.depth * layers, size.depth * scores
    both = 2.0 * size.width**2  # weights of keys and values
    last = 2.0 * (tokens * both + size.block_weights - both)
    return (size.depth - 1) * layers + last, ((size.depth - 1) + 1 / tokens) * scores


def memory(size: Sizes) -> dict[str, float]:
    """Bytes on the device: what stays, and on top of it what each moment of a step needs.

    The peak is "stays" plus the largest of the others.
    """
    wide, entries = size.wide_bytes, size.num_prototypes * size.head[-1]
    gradients, slopes = size.num_trained * wide, entries * wide
    several = size.micro_batch_size < size.num_images
    values = sum(group.num_crops * group.num_values for group in size.groups)
    casts = (size.num_student - entries) * size.float_bytes * (size.float_bytes < wide)
    # the student's pass, and the way back through crops of one size after the other
    kept, back = float(casts), 0.0
    for group in size.groups:
        tokens = size.micro_batch_size * group.num_crops * group.num_tokens
        kept += tokens * _kept(size, group.num_tokens)
        beside = BLOCK.backward_width * size.width + BLOCK.backward_hidden * size.hidden
        back = max(back, kept + tokens * beside * size.float_bytes)
    rows = size.micro_batch_size * size.num_student_crops
    head = rows * (2 * sum(size.head[1:-1]) + size.head[0] + 3 * size.head[-1])
    kept, back = kept + head * size.float_bytes, back + head * size.float_bytes
    columns = size.num_student_crops + size.num_teacher_crops
    image = columns * size.num_prototypes * wide  # bytes of the logits of one image
    chunk = min(
        size.micro_batch_size * image, max(image, LOGITS_BYTES["cpu" if size.on_cpu else "cuda"])
    )
    # the teacher's pass over the whole batch, and its logits for centering, twice for a moment
    batch = size.num_images * size.num_teacher_crops
    passing = BLOCK.forward_width * size.width * wide
    passing += (BLOCK.forward_width * size.width + BLOCK.forward_hidden * size.hidden) * (
        size.float_bytes
    )
    teacher = batch * max(size.groups[0].num_tokens * passing, 2.0 * size.num_prototypes * wide)
    return {
        "stays": wide
        * (size.num_student + size.num_teacher + 2.0 * size.num_trained + size.num_images * values),
        "teacher": gradients + teacher,
        "loss": kept + gradients * several + slopes + chunk,
        "backward": back + gradients * several + 2.0 * slopes,
        "update": gradients,
    }


def kept_bytes(size: Sizes) -> float:
    """Of all blocks for the backward pass, were the batch of a rank taken at once."""
    tokens = [(group.num_crops * group.num_tokens, group.num_tokens) for group in size.groups]
    return size.num_images * sum(num * _kept(size, of_crop) for num, of_crop in tokens)


def _kept(size: Sizes, tokens: int) -> float:
    """Bytes kept of a token of a crop of `tokens`, by all blocks and the last norm."""
    before = size.width * size.wide_bytes  # what a block, or a norm, takes in
    if size.memory == "low":
        return size.depth * before
    hidden = BLOCK.kept_hidden_high if size.memory == "high" else BLOCK.kept_hidden
    width = BLOCK.kept_width + BLOCK.kept_layer_scale * size.layer_scale
    inner = width * size.width + hidden * size.hidden
    inner += BLOCK.kept_scores * size.num_heads * tokens
    whole = size.student_part * (BLOCK.kept_wide * before + inner * size.float_bytes)
    if not BLOCK.class_token_last:
        return size.depth * whole + before
    # Of the last block: its input, and what its norm, keys and values are.
    last = size.student_part * (before + 3.0 * size.width * size.float_bytes)
    return (size.depth - 1) * whole + last
