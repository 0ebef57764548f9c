"""One pass through transformer blocks: timm's parts, in an order and with a memory of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from timm.layers.mlp import GluMlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dino_lite.settings.kinds import Must

Memory = Literal["high", "normal", "low"]
Activation = Callable[[Tensor], Tensor]
Project = Callable[[Activation, Tensor, nn.Linear], Tensor]  # layer(act(x))
DropPathBy = Literal["sample", "batch"]
DropRate = Annotated[float, Must("a number in [0, 1)", lambda rate: 0 <= rate < 1)]
# What stochastic depth does to a half of a block: multiplies it by a number a sample, or lets only
# these m samples through; None: nothing.
Drop = Float[Tensor, "n 1 1"] | Int64[Tensor, "m"] | None
# Sines and cosines by which the queries and keys of the last P tokens, patches, are turned.
Rotation = tuple[Float[Tensor, "P d"], Float[Tensor, "P d"]]
PLAIN_TOKENS = 128  # up to so many, plain attention is quicker on a CPU than the fused kernel


def set_memory(network: nn.Module, memory: Memory, compiled: bool) -> None:
    """How the transformers inside `network` go through their blocks; no result depends on it."""
    part: Any
    for part in network.modules():
        if hasattr(part, "compiled") and hasattr(part, "memory"):
            part.memory, part.compiled = memory, compiled


def run_blocks(
    blocks: Sequence[nn.Module],
    tokens: Float[Tensor, "n N D"],
    last_queries: int | None = None,
    memory: Memory = "high",
    compiled: bool = False,
    drop_path_by: DropPathBy = "sample",
    rotation: Rotation | None = None,
) -> Float[Tensor, "n _ D"]:
    """All blocks; of the last one only the first `last_queries` tokens, where that is given.

    `memory` says what is kept for the backward pass: high all, normal all but what the MLP's
    activation has made, low the tokens between blocks. The rest is made again. A compiled block
    chooses for itself, where `memory` is not low. Evaluations, which know sizes of their own, are
    not compiled.
    """
    if not torch.is_grad_enabled():
        memory = "high"
    compiled = compiled and not torch.is_inference_mode_enabled()
    # A graph that has scales is another than one without: the first block, which never drops, gets
    # ones where others draw. Parts of the batch are then scales too, and save nothing.
    scales = compiled and not _share_a_graph(blocks, drop_path_by)
    for i, block in enumerate(blocks):
        act: Any = cast(Any, block).mlp.act
        again = memory == "normal" and not compiled and next(act.parameters(), None) is None
        project = _project_again if again else _project
        queries = last_queries if i == len(blocks) - 1 else None
        drops = draw_drops(block, tokens, drop_path_by, scales)
        run = partial(_compiled() if compiled else run_block, block)
        if memory == "low":
            kept = (tokens, drops, queries, project, rotation)
            tokens = checkpoint(run, *kept, use_reentrant=False)
        else:
            tokens = run(tokens, drops, queries, project, rotation)
    return tokens


def run_block(
    block: nn.Module,
    tokens: Float[Tensor, "n N D"],
    drops: tuple[Drop, Drop],
    num_queries: int | None,
    project: Project,
    rotation: Rotation | None = None,
) -> Float[Tensor, "n _ D"]:
    """x + attention(norm(x)), then x + MLP(norm(x)), each half less what stochastic depth drops.

    With `num_queries` only the first so many tokens are computed; the others are looked at. What
    they would have become is not asked for after a last block: five sixths of it are saved.
    """
    parts: Any = block

    def attend(x: Tensor) -> Tensor:
        if num_queries is None:
            return cast(Tensor, parts.ls1(_attend(parts, x, rotation)))
        return cast(Tensor, parts.ls1(_look(parts, x, num_queries, rotation)))

    def mlp(x: Tensor) -> Tensor:
        hidden = parts.mlp.fc1(parts.norm2(x))
        return cast(Tensor, parts.ls2(project(_activation(parts.mlp), hidden, parts.mlp.fc2)))

    queries = tokens if num_queries is None else tokens[:, :num_queries]
    queries = _add(queries, attend, tokens, drops[0])
    return _add(queries, mlp, queries, drops[1])


def _activation(mlp: Any) -> Activation:
    """What stands between the two layers of an MLP; a gated one halves the width."""
    return partial(_gate, mlp.act) if isinstance(mlp, GluMlp) else mlp.act


def _gate(act: nn.Module, packed: Float[Tensor, "n N _"]) -> Float[Tensor, "n N _"]:
    """act(a)·b of [a, b]: SwiGLU, where act is SiLU (Shazeer 2020)."""
    gate, value = packed.chunk(2, dim=-1)
    out: Tensor = act(gate) * value
    return out


@cache
def _compiled() -> Callable[..., Tensor]:
    """run_block as one graph for each shape: all blocks of a network share it."""
    # Sizes of crops x places in the network x student and teacher x sizes of micro-batches: torch
    # would stop at eight, and go on without a graph.
    settings: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"
    setattr(settings, name, max(getattr(settings, name), 64))
    compiled: Callable[..., Tensor] = torch.compile(run_block, dynamic=False)
    return compiled


def attention(
    query: Float[Tensor, "n heads M d"],
    key: Float[Tensor, "n heads N d"],
    value: Float[Tensor, "n heads N d"],
    scale: float,
) -> Float[Tensor, "n heads M d"]:
    """softmax(QKᵀ·scale)·V by the kernel that is quickest here (docs/performance.md)."""
    slopes = torch.is_grad_enabled() and query.device.type == "cpu"
    if slopes and (query.dtype == torch.bfloat16 or key.shape[2] <= PLAIN_TOKENS):
        return ((query * scale) @ key.transpose(-2, -1)).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def _attend(
    block: Any, tokens: Float[Tensor, "n N D"], rotation: Rotation | None
) -> Float[Tensor, "n N D"]:
    """Multi-head self-attention of all tokens."""
    attn = block.attn
    return _mix(attn, rotation, *_heads(attn.qkv(block.norm1(tokens)), 3, attn.num_heads))


def _look(
    block: Any, tokens: Float[Tensor, "n N D"], num_queries: int, rotation: Rotation | None
) -> Float[Tensor, "n _ D"]:
    """What the first `num_queries` tokens get from all: keys and values of all, queries of few."""
    attn, tokens = block.attn, block.norm1(tokens)
    weight, bias, width = attn.qkv.weight, attn.qkv.bias, attn.qkv.in_features
    first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
    query = F.linear(tokens[:, :num_queries], weight[:width], first)
    both = F.linear(tokens, weight[width:], rest)
    heads = attn.num_heads
    return _mix(attn, rotation, *_heads(query, 1, heads), *_heads(both, 2, heads))


def _heads(packed: Float[Tensor, "n N _"], num: int, num_heads: int) -> tuple[Tensor, ...]:
    """`num` tensors "n heads N d" that lie side by side in `packed`."""
    apart = packed.view(*packed.shape[:2], num, num_heads, -1).permute(2, 0, 3, 1, 4)
    return apart.unbind(0)


def _mix(attn: Any, rotation: Rotation | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key = prepare(attn, query, key, rotation)
    mixed = attention(query, key, value, attn.scale).transpose(1, 2).flatten(2)
    out: Tensor = attn.proj(mixed)
    return out


def prepare(
    attn: Any,
    query: Float[Tensor, "n heads M d"],
    key: Float[Tensor, "n heads N d"],
    rotation: Rotation | None,
) -> tuple[Float[Tensor, "n heads M d"], Float[Tensor, "n heads N d"]]:
    """Queries and keys as they meet: normed where the block does that, then turned."""
    query, key = attn.q_norm(query), attn.k_norm(key)
    if rotation is None:
        return query, key
    num_first = key.shape[2] - len(rotation[0])
    return _turn(query, rotation, num_first), _turn(key, rotation, num_first)


def _turn(
    x: Float[Tensor, "n heads M d"], rotation: Rotation, num_first: int
) -> Float[Tensor, "n heads M d"]:
    """All but the first `num_first` turned in the planes of their features i and i + d/2 (RoPE, Su
    et al. 2021): in the rotation's precision, then in that of `x`.
    """
    first, rest = x[:, :, :num_first], x[:, :, num_first:]
    if not rest.shape[2]:
        return x
    sin, cos = (each[: rest.shape[2]] for each in rotation)
    low, high = rest.chunk(2, dim=-1)
    turned = rest * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([first, turned.to(x.dtype)], dim=2)


def computed_part(transformer: Any, compiled: bool) -> float:
    """How much of the work of its blocks stochastic depth leaves in training."""
    blocks, by = list(transformer.blocks), transformer.drop_path_by
    if by == "sample" or (compiled and not _share_a_graph(blocks, by)):
        return 1.0
    return sum(1 - _drop_prob(block.drop_path1) for block in blocks) / len(blocks)


def _share_a_graph(blocks: Sequence[nn.Module], drop_path_by: str) -> bool:
    """Whether all blocks drop alike: none, or parts of one size."""
    probs = {_drop_prob(cast(Any, block).drop_path1) for block in blocks}
    return probs == {0.0} or (drop_path_by == "batch" and len(probs) == 1)


def draw_drops(
    block: Any, tokens: Tensor, drop_path_by: DropPathBy, scales: bool
) -> tuple[Drop, Drop]:
    """What stochastic depth drops of the two halves of a block: by sample, each with probability p,
    and the others count 1/(1 - p) times; by batch, all but m = max(⌊n·(1 - p)⌋, 1) samples, which
    count n/m times (Oquab et al. 2023, section 5). `scales`: whatever is dropped, as factors.
    """
    drops: list[Drop] = []
    num = len(tokens)
    for path in (block.drop_path1, block.drop_path2):
        prob = _drop_prob(path)
        keep = tokens.new_ones(num, 1, 1) if scales or (prob and drop_path_by == "sample") else None
        if prob and drop_path_by == "batch":
            rows = torch.randperm(num, device=tokens.device)[: max(int(num * (1 - prob)), 1)]
            keep = rows if keep is None else keep.zero_().index_fill_(0, rows, num / len(rows))
        elif prob:
            keep = cast(Tensor, keep).bernoulli_(1 - prob).div_(1 - prob)
        drops.append(keep)
    return drops[0], drops[1]


def _drop_prob(drop: Any) -> float:
    return float(getattr(drop, "drop_prob", None) or 0.0) if drop.training else 0.0


def _add(tokens: Tensor, branch: Activation, x: Tensor, drop: Drop) -> Tensor:
    """tokens + branch(x), less what is dropped; what would be dropped by batch is not computed."""
    if drop is None:
        return tokens + branch(x)
    if drop.is_floating_point():
        return tokens + branch(x) * drop
    more = branch(x.index_select(0, drop)).to(tokens.dtype)
    return tokens.index_add(0, drop, more, alpha=len(tokens) / len(drop))


def _project(act: Activation, x: Tensor, layer: nn.Linear) -> Tensor:
    out: Tensor = layer(act(x))
    return out


def _project_again(act: Activation, x: Tensor, layer: nn.Linear) -> Tensor:
    out: Tensor = _ProjectAgain.apply(act, x, layer.weight, layer.bias)
    return out


class _ProjectAgain(torch.autograd.Function):
    """layer(act(x)) that keeps x and makes act(x) once more in the backward pass: a quarter of a
    block's memory for a fortieth of its time.
    """

    @staticmethod
    def forward(
        ctx: Any, act: Activation, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.act, ctx.has_bias = act, bias is not None
        ctx.save_for_backward(x, weight)
        return F.linear(act(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.act(x)
        rows = slope.flatten(0, -2)
        slope_w = (rows.T @ y.detach().flatten(0, -2).to(rows.dtype)).to(weight.dtype)
        slope_b = rows.sum(0).to(weight.dtype) if ctx.has_bias else None
        slope_y = (slope @ weight.to(slope.dtype)).to(y.dtype)
        (slope_x,) = torch.autograd.grad(y, x, slope_y)
        return None, slope_x, slope_w, slope_b
