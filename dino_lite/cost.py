"""What an optimizer step costs, from `sizes` alone: products, bytes that are moved, memory.

Every constant that belongs to how the step is written stands in `BLOCK`, `LOSS` and `WEIGHTS`.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from dino_lite.backbones.layers import PLAIN_TOKENS
from dino_lite.contracts import LOGITS_BYTES
from dino_lite.losses.gram import MATRIX_BYTES
from dino_lite.sizes import Anchored, Head, Sizes


class Block(NamedTuple):
    """How a transformer block is computed. Floats are those of a token: D its width, H the hidden
    width of its MLP (of both halves, where one is the gate), h heads, N tokens of a crop.
    """

    # kept for the backward pass: 2·D in the weights' precision (what both norms take in) and, in
    # the run's, 6·D (what both norms give, queries, keys, values, attention) + H (before GELU; and
    # after it, where memory is high) + h·N and D (attention weights and scaled queries, where a CPU
    # does without the fused kernel; turned ones are there already) + 2·D (what LayerScale takes in)
    # + 2·D (turned queries and keys); where memory is low, what the block takes in alone
    kept_wide: float = 2.0
    kept_width: float = 6.0
    kept_hidden: float = 1.0
    kept_hidden_high: float = 2.0
    kept_plain: tuple[float, float] = (1.0, 1.0)  # times D, times h·N
    kept_layer_scale: float = 2.0
    kept_rotation: float = 2.0
    # alive at once while a block is computed without gradient, and beside the kept while it is
    # gone through backward (slopes of what is at hand)
    forward_width: float = 3.0
    forward_hidden: float = 2.0
    backward_width: float = 2.0
    backward_hidden: float = 2.0  # less 1, where what GELU gives is kept
    # read and written outside products: norms, sums, GELU, biases' gradients
    moved_forward: tuple[float, float] = (10.0, 2.0)  # times D, times H
    moved_backward: tuple[float, float] = (17.0, 4.0)
    moved_layer_scale: tuple[float, float] = (4.0, 10.0)  # forward, backward; times D
    moved_rotation: tuple[float, float] = (16.0, 16.0)
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
    balance_moved: float = 10.0  # and for a round of Sinkhorn-Knopp, whose logits
    balance_products: float = 1.0  # are made anew where they do not fit
    gram_products: float = 4.0  # the patches' of both, and two slopes of the student's
    gram_moved: float = 12.0  # floats a pair of patches
    prototypes_moved: float = 12.0  # floats an entry: norms of both, slopes through them


class Weights(NamedTuple):
    """What follows a gradient, in floats a weight that are read and written."""

    update: float = 7.0  # AdamW: weight, gradient, two moments; three of them written
    average: float = 3.0  # the teacher
    clip: float = 3.0
    calls: float = 10.0  # a tensor, where the device has no call for many at once
    other_calls: float = 200.0  # the head, the loss, the rest of a step


BLOCK, LOSS, WEIGHTS = Block(), Loss(), Weights()


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


def work(size: Sizes) -> Work:
    """Of one optimizer step. Left out: resampled positions, norms' and losses' own arithmetic."""
    linear = attention = moved = calls = 0.0
    # forward: where memory is low, a block is made again, all but its last layer
    passes = 1.0 + (size.memory == "low") * (1 - size.last_weights / size.block_weights)
    for group in size.groups:
        taught, done = group is size.groups[0], size.student_part
        crops, tokens = size.num_images * group.num_crops, group.num_tokens
        # The patches' product has no slope of the pixels.
        stem = 2.0 * group.num_values * size.width
        layers, scores = _block_flops(size, tokens, group.whole)
        layers_taught, scores_taught = _block_flops(size, tokens, size.teacher_whole)
        linear += crops * (
            stem * (2 + taught) + layers * (passes + 2) * done + layers_taught * taught
        )
        attention += crops * scores * (passes + BLOCK.attention_backward) * done
        attention += crops * scores_taught * taught
        forward, backward = _block_moved(size, tokens)
        moved += crops * (forward * (passes * done + taught) + backward * done) * size.float_bytes
        parts = ceil(size.num_images / size.micro_batch_size)
        calls += parts * size.depth * (passes * BLOCK.calls_forward + BLOCK.calls_backward)
        calls += taught * size.depth * BLOCK.calls_forward
    floats = (WEIGHTS.update + WEIGHTS.clip) * size.num_trained
    averaged = size.num_teacher - (size.anchored.num_weights if size.anchored else 0)
    floats += WEIGHTS.average * averaged
    calls += WEIGHTS.other_calls + size.on_cpu * WEIGHTS.calls * size.num_tensors
    total = Work(linear, attention, 0.0, moved + floats * size.wide_bytes, calls)
    for head in size.heads:
        total = _add(total, _head_work(size, head))
    if size.anchored is not None:
        total = _add(total, _anchor_work(size, size.anchored), size.anchored.share)
    return total


def _add(a: Work, b: Work, share: float = 1.0) -> Work:
    return Work(*(x + share * y for x, y in zip(a, b, strict=True)))


def _head_work(size: Sizes, head: Head) -> Work:
    """A head, its centering and its loss."""
    items = size.num_images * head.items
    students, teachers = items * head.students, items * head.teachers
    layers = 2.0 * sum(a * b for a, b in zip(head.widths, head.widths[1:], strict=False))
    anew = head.balances * LOSS.balance_products * (_logits(size, head) > _held(size))
    products = LOSS.student_products * students + (LOSS.teacher_products + anew) * teachers
    logits = LOSS.student_moved * students
    logits += (LOSS.teacher_moved + LOSS.balance_moved * head.balances) * teachers
    floats = logits * head.num_prototypes + LOSS.prototypes_moved * head.entries
    linear = layers * (3 * students + teachers)
    return Work(linear, 0.0, 2.0 * products * head.entries, floats * size.wide_bytes, 0.0)


def _anchor_work(size: Sizes, anchored: Anchored) -> Work:
    """The Gram teacher's pass and the patches' matrices."""
    group, pairs = anchored.crops, anchored.num_patches**2
    crops = size.num_images * group.num_crops
    layers, scores = _block_flops(size, group.num_tokens, True)
    linear = crops * (2.0 * group.num_values * size.width + layers)
    matrices = crops * LOSS.gram_products * 2.0 * pairs * size.width
    moved = crops * _block_moved(size, group.num_tokens)[0] * size.float_bytes
    moved += crops * LOSS.gram_moved * pairs * size.wide_bytes
    calls = size.depth * BLOCK.calls_forward
    return Work(linear, crops * scores, matrices, moved, calls)


def _block_moved(size: Sizes, tokens: int) -> tuple[float, float]:
    """Floats that all blocks read and write for one crop beside products: forward, backward."""
    found = []
    for i, (width, hidden) in enumerate((BLOCK.moved_forward, BLOCK.moved_backward)):
        width += BLOCK.moved_layer_scale[i] * size.layer_scale
        width += BLOCK.moved_rotation[i] * size.rotates
        found.append(size.depth * tokens * (width * size.width + hidden * size.hidden))
    return found[0], found[1]


def _block_flops(size: Sizes, tokens: int, whole: bool) -> tuple[float, float]:
    """Forward FLOPs of all blocks for one crop: of the layers, and of attention. Unless `whole`,
    the last block is the class token's.
    """
    layers, scores = 2.0 * tokens * size.block_weights, 4.0 * tokens**2 * size.width
    if whole or not BLOCK.class_token_last:
        return size.depth * layers, size.depth * scores
    both = 2.0 * size.width**2  # weights of keys and values
    last = 2.0 * (tokens * both + size.block_weights - both)
    return (size.depth - 1) * layers + last, ((size.depth - 1) + 1 / tokens) * scores


def memory(size: Sizes) -> dict[str, float]:
    """Bytes on the device: what stays, and on top of it what each moment of a step needs.

    The peak is "stays" plus the largest of the others.
    """
    wide = size.wide_bytes
    gradients, slopes = size.num_trained * wide, sum(head.entries for head in size.heads) * wide
    several = size.micro_batch_size < size.num_images
    values = sum(group.num_crops * group.num_values for group in size.groups)
    casts = (size.num_student - size.num_entries) * size.float_bytes * (size.float_bytes < wide)
    # the student's pass, and the way back through crops of one size after the other
    kept, back = float(casts), 0.0
    for group in size.groups:
        tokens = size.micro_batch_size * group.num_crops * group.num_tokens
        kept += tokens * _kept(size, group.num_tokens, group.whole)
        hidden = BLOCK.backward_hidden - (size.memory != "normal")
        beside = (BLOCK.backward_width * size.width + hidden * size.hidden) * size.float_bytes
        if size.memory == "low":  # one block at a time is made again
            beside += _block_kept(size, group.num_tokens, BLOCK.kept_hidden_high)
        back = max(back, kept + tokens * beside)
    chunk = 0.0
    for head in size.heads:
        students = size.micro_batch_size * head.items * head.students
        inner = 2 * sum(head.widths[1:-1]) + head.widths[0] + 3 * head.widths[-1]
        kept += students * inner * size.float_bytes
        back += students * inner * size.float_bytes
        item = (head.students + head.teachers) * head.num_prototypes * wide  # bytes of its logits
        items = size.micro_batch_size * head.items
        chunk = max(chunk, min(items * item, max(item, _held(size))))
    anchor = _anchor_memory(size)
    return {
        "stays": wide
        * (size.num_student + size.num_teacher + 2.0 * size.num_trained + size.num_images * values)
        + anchor["stays"],
        "teacher": gradients + max(_teacher_memory(size), anchor["teacher"]),
        "loss": kept + gradients * several + slopes + chunk + anchor["loss"],
        "backward": back + gradients * several + 2.0 * slopes,
        "update": gradients,
    }


def _passing(size: Sizes, tokens: int) -> float:
    """Bytes at hand while a block is computed without gradient for a crop of so many tokens."""
    width = BLOCK.forward_width * size.width
    inner = (width + BLOCK.forward_hidden * size.hidden) * size.float_bytes
    return tokens * (width * size.wide_bytes + inner)


def _teacher_memory(size: Sizes) -> float:
    """The teacher's pass over the whole batch, and then its logits for centering, twice for a
    moment; beside them the tokens of all patches, where they are asked for.
    """
    group = size.groups[0]
    crops = size.num_images * group.num_crops
    tokens = crops * group.num_tokens * size.width * size.wide_bytes * size.teacher_whole
    logits = (min(_logits(size, head), _held(size)) for head in size.heads)
    return max(crops * _passing(size, group.num_tokens), tokens + 2.0 * max(logits))


def _anchor_memory(size: Sizes) -> dict[str, float]:
    """Of Gram anchoring: its own crops and the patches they become, its teacher's pass, and the
    patches' matrices, held a few at a time.
    """
    if size.anchored is None:
        return dict.fromkeys(("stays", "teacher", "loss"), 0.0)
    group, num_patches = size.anchored.crops, size.anchored.num_patches
    crops, wide = size.num_images * group.num_crops, size.wide_bytes
    own = group.num_values * size.anchored.own_crops
    compared = size.micro_batch_size * group.num_crops
    matrices = min(compared * num_patches**2 * wide, MATRIX_BYTES)
    return {
        "stays": wide * crops * (own + num_patches * size.width),
        "teacher": crops * _passing(size, group.num_tokens),
        "loss": wide * compared * 2.0 * num_patches * size.width + 4.0 * matrices,
    }


def _logits(size: Sizes, head: Head) -> float:
    """Bytes of a batch's, the teacher's."""
    rows = size.num_images * head.items * head.teachers
    return rows * head.num_prototypes * size.wide_bytes


def _held(size: Sizes) -> int:
    """Bytes of logits that are held at once."""
    return LOGITS_BYTES["cpu" if size.on_cpu else "cuda"]


def kept_bytes(size: Sizes) -> float:
    """Of all blocks for the backward pass, were the batch of a rank taken at once."""
    return size.num_images * sum(
        group.num_crops * group.num_tokens * _kept(size, group.num_tokens, group.whole)
        for group in size.groups
    )


def _kept(size: Sizes, tokens: int, whole: bool) -> float:
    """Bytes kept of a token of a crop of `tokens`, by all blocks and the last norm."""
    before = size.width * size.wide_bytes  # what a block, or a norm, takes in
    if size.memory == "low":
        return size.depth * before
    hidden = BLOCK.kept_hidden_high if size.memory == "high" else BLOCK.kept_hidden
    block = _block_kept(size, tokens, hidden)
    if whole or not BLOCK.class_token_last:
        return size.depth * block + before
    # Of the last block: its input, and what its norm, keys and values are.
    last = size.student_part * (before + 3.0 * size.width * size.float_bytes)
    return (size.depth - 1) * block + last


def _block_kept(size: Sizes, tokens: int, hidden: float) -> float:
    """Bytes of a token, by one block that keeps `hidden` times its MLP's width."""
    width = BLOCK.kept_width + BLOCK.kept_layer_scale * size.layer_scale
    width += BLOCK.kept_rotation * size.rotates
    inner = width * size.width + hidden * size.hidden
    if size.on_cpu and (tokens <= PLAIN_TOKENS or size.float_bytes == 2):
        inner += BLOCK.kept_plain[0] * size.width * (not size.rotates)
        inner += BLOCK.kept_plain[1] * size.num_heads * tokens
    wide = BLOCK.kept_wide * size.width * size.wide_bytes
    return size.student_part * (wide + inner * size.float_bytes)
