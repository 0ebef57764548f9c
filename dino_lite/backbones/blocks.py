"""Transformer blocks, and the forward pass through a sequence of them: activation memory,
stochastic depth, and pruning of the last block's queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Annotated, Any, Literal, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from dino_lite.backbones.layers import MLP, Attention, Rotation, has_hooks, is_bare
from dino_lite.contracts import Backbone, Memory
from dino_lite.settings.kinds import Must

DropPathBy = Literal["sample", "batch"]
DropRate = Annotated[float, Must("a number in [0, 1)", lambda rate: 0 <= rate < 1)]
# Stochastic depth on one residual branch: a factor per sample, or the indices of the m samples that
# are kept; None: off.
Drop = Float[Tensor, "n 1 1"] | Int64[Tensor, "m"] | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), built from the layers of a timm block.

    Layers have timm's names and order, and each is called as a module, so that hooks, adapters,
    quantization, tracing and FSDP work as on any network. Two fast paths, `slice_qkv` and
    `recompute` (in training), read a weight instead of calling its layer; `run_blocks` enables them
    if the layer is bare (`layers.is_bare`), so that this has no visible effect.
    """

    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = parts.norm1, Attention(parts.attn), parts.ls1
        self.drop_path1 = parts.drop_path1
        self.norm2, self.mlp, self.ls2 = parts.norm2, MLP(parts.mlp), parts.ls2
        self.drop_path2 = parts.drop_path2

    def forward(
        self,
        tokens: Float[Tensor, "n N D"],
        rotation: Rotation | None = None,
        drops: tuple[Drop, Drop] = (None, None),
        num_queries: int | None = None,
        slice_qkv: bool = False,
        recompute: bool = False,
    ) -> Float[Tensor, "n _ D"]:
        """Output for the first `num_queries` tokens (None: all). Without `drops`, stochastic depth
        is drawn by the block's own DropPath, as in timm.
        """

        def attend(x: Tensor) -> Tensor:
            found = self.attn(self.norm1(x), rotation, num_queries, slice_qkv)
            return cast(Tensor, self.ls1(found))

        def mlp(x: Tensor) -> Tensor:
            return cast(Tensor, self.ls2(self.mlp(self.norm2(x), recompute)))

        queries = tokens if num_queries is None else tokens[:, :num_queries]
        queries = _add(queries, attend, tokens, drops[0], self.drop_path1)
        return _add(queries, mlp, queries, drops[1], self.drop_path2)


def set_memory(network: nn.Module, memory: Memory, compiled: bool) -> None:
    """Set activation memory and compilation of all backbones in `network`. Affects speed and
    memory only, not results.
    """
    for part in network.modules():
        if isinstance(part, Backbone):
            part.set_memory(memory, compiled)


def run_blocks(
    blocks: Sequence[nn.Module],
    tokens: Float[Tensor, "n N D"],
    last_queries: int | None = None,
    memory: Memory = "high",
    compiled: bool = False,
    drop_path_by: DropPathBy = "sample",
    rotation: Rotation | None = None,
) -> Float[Tensor, "n _ D"]:
    """Run all blocks; the last one computes only its first `last_queries` tokens (None: all).

    `memory` selects the activations saved for the backward pass; the others are recomputed. high:
    all; normal: all but the output of the MLP's activation; low: only the tokens between blocks.
    In a compiled block, or where the whole network is compiled or traced, the compiler decides,
    unless `memory` is low. Inference mode is never compiled, since evaluations use other image
    sizes. For the fast paths see `Block`.
    """
    memory = memory if torch.is_grad_enabled() else "high"
    compiled = compiled and not torch.is_inference_mode_enabled()
    # Blocks with and without drop factors compile to different graphs. If any block drops, all get
    # factors (ones in a block that never drops), also for drop path by batch, which then saves no
    # computation.
    scales = compiled and not _share_a_graph(blocks, drop_path_by)
    traced = torch.compiler.is_compiling() or cast(Any, torch.jit).is_tracing()
    for i, block in enumerate(blocks):
        parts = cast(Block, block)
        queries = last_queries if i == len(blocks) - 1 else None
        slice_qkv = queries is not None and is_bare(parts.attn.qkv)
        recompute = (
            memory == "normal"
            and not compiled
            and not traced
            and block.training
            and is_bare(parts.mlp.fc2)
            and not has_hooks(parts.mlp.act)
            and next(parts.mlp.act.parameters(), None) is None
        )
        drops = draw_drops(block, tokens, drop_path_by, scales)
        run = partial(_compiled(), block) if compiled else block
        given = (tokens, rotation, drops, queries, slice_qkv, recompute)
        if memory == "low":
            # A pass in eval mode may be recomputed after the network is in training mode again.
            modes = noop_context_fn if block.training or traced else partial(_again, block)
            tokens = checkpoint(run, *given, use_reentrant=False, context_fn=modes)
        else:
            tokens = run(*given)
    return tokens


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Context in which `network` is in eval mode; afterwards each part has its own mode again."""
    modes = [(part, part.training) for part in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), evaluating(block)


@cache
def _compiled() -> Callable[..., Tensor]:
    """The compiled block: one graph per shape, shared by all blocks of a network."""
    # Crop sizes x positions in the network x student and teacher x micro-batch sizes exceed torch's
    # default limit of 8 graphs, beyond which it falls back to eager execution.
    settings: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"
    setattr(settings, name, max(getattr(settings, name), 64))
    compiled: Callable[..., Tensor] = torch.compile(_call, dynamic=False)
    return compiled


def _call(block: nn.Module, *given: Any) -> Tensor:
    out: Tensor = block(*given)
    return out


def _share_a_graph(blocks: Sequence[nn.Module], drop_path_by: str) -> bool:
    """Whether all blocks drop nothing, or all drop the same part of the batch."""
    probs = {_drop_prob(cast(Any, block).drop_path1) for block in blocks}
    return probs == {0.0} or (drop_path_by == "batch" and len(probs) == 1)


def draw_drops(
    block: Any, tokens: Tensor, drop_path_by: DropPathBy, scales: bool
) -> tuple[Drop, Drop]:
    """Draw stochastic depth for the two residual branches of a block. By sample: each sample is
    dropped with probability p, the others are scaled by 1/(1 - p). By batch: exactly
    m = max(⌊n·(1 - p)⌋, 1) samples are kept and scaled by n/m (Oquab et al. 2023, section 5). With
    `scales` the result is always factors.
    """
    drops: list[Drop] = []
    num = tokens.shape[0]
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


def _add(
    tokens: Tensor, branch: Callable[[Tensor], Tensor], x: Tensor, drop: Drop, path: nn.Module
) -> Tensor:
    """tokens + branch(x) with stochastic depth; the branch is computed only for the samples that
    `drop` keeps. Without `drop` the block's own DropPath `path` is applied.
    """
    if drop is None:
        return tokens + cast(Tensor, path(branch(x)))
    if drop.is_floating_point():
        return tokens + branch(x) * drop
    more = branch(x.index_select(0, drop)).to(tokens.dtype)
    return tokens.index_add(0, drop, more, alpha=len(tokens) / len(drop))
