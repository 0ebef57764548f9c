"""Attention and MLP of a transformer block: timm's layers in a forward pass of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.mlp import GluMlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as every_module

# Sines and cosines of the angles by which queries and keys of the P patch tokens, which come last,
# are rotated.
Rotation = tuple[Float[Tensor, "P d"], Float[Tensor, "P d"]]
PLAIN_TOKENS = 128  # up to this many, plain attention is faster on a CPU than the fused kernel


class Attention(nn.Module):
    """Multi-head self-attention built from the layers of timm's `Attention`."""

    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.num_heads: int = parts.num_heads
        self.scale: float = parts.scale
        self.qkv, self.q_norm, self.k_norm = parts.qkv, parts.q_norm, parts.k_norm
        self.proj = parts.proj

    def forward(
        self,
        tokens: Float[Tensor, "n N D"],
        rotation: Rotation | None = None,
        num_queries: int | None = None,
        slice_qkv: bool = False,
    ) -> Float[Tensor, "n _ D"]:
        """Attention output of the first `num_queries` tokens (None: all) over all tokens.

        With `slice_qkv` the queries of the other tokens are not computed; this reads the weight of
        `qkv` instead of calling it.
        """
        if num_queries is None or not slice_qkv:
            query, key, value = self._heads(self.qkv(tokens), 3)
            query = query if num_queries is None else query[:, :, :num_queries]
        else:
            weight, bias, width = self.qkv.weight, self.qkv.bias, tokens.shape[-1]
            first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
            (query,) = self._heads(F.linear(tokens[:, :num_queries], weight[:width], first), 1)
            key, value = self._heads(F.linear(tokens, weight[width:], rest), 2)
        query, key = prepare(self, query, key, rotation)
        mixed = attention(query, key, value, self.scale).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(mixed)
        return out

    def weights(
        self, tokens: Float[Tensor, "n N D"], rotation: Rotation | None = None
    ) -> Float[Tensor, "n heads N N"]:
        """Softmax attention weights of every token over all tokens."""
        query, key, _ = self._heads(self.qkv(tokens), 3)
        query, key = prepare(self, query, key, rotation)
        return (query @ key.transpose(-2, -1) * self.scale).softmax(dim=-1)

    def _heads(self, packed: Float[Tensor, "n N _"], num: int) -> tuple[Tensor, ...]:
        """Split `packed` into `num` tensors "n heads N d"."""
        apart = packed.view(*packed.shape[:2], num, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return apart.unbind(0)


class MLP(nn.Module):
    """Two linear layers and an activation, optionally gated, from timm's `Mlp` or `GluMlp`."""

    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.gated = isinstance(parts, GluMlp)
        self.fc1, self.act, self.fc2 = parts.fc1, parts.act, parts.fc2

    def forward(
        self, tokens: Float[Tensor, "n N D"], recompute: bool = False
    ) -> Float[Tensor, "n N D"]:
        """fc2(act(fc1(tokens))). With `recompute` the output of the activation is recomputed in the
        backward pass; this reads the weight of `fc2` instead of calling it.
        """
        hidden = self.fc1(tokens)
        if recompute:
            again: Any = _ProjectAgain.apply
            return cast(Tensor, again(self.activate, hidden, self.fc2.weight, self.fc2.bias))
        return cast(Tensor, self.fc2(self.activate(hidden)))

    def activate(self, hidden: Float[Tensor, "n N _"]) -> Float[Tensor, "n N _"]:
        """act(x); if gated, act(a)·b with x = [a, b], which is SwiGLU if act is SiLU (Shazeer
        2020).
        """
        if not self.gated:
            return cast(Tensor, self.act(hidden))
        gate, value = hidden.chunk(2, dim=-1)
        return cast(Tensor, self.act(gate) * value)


class UnbiasedKeys(nn.Module):
    """A qkv projection with biases for queries and values only. (Softmax is invariant to a bias of
    keys unless it is rotated by position; DINOv3 masks it.)
    """

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.weight = qkv.in_features, qkv.weight
        self.q_bias, self.v_bias = (
            nn.Parameter(qkv.weight.new_zeros(qkv.in_features)) for _ in range(2)
        )

    @property
    def bias(self) -> Float[Tensor, "_"]:
        """The concatenated bias, zero for keys."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Float[Tensor, "n N D"]) -> Float[Tensor, "n N _"]:
        """Equivalent to nn.Linear."""
        return F.linear(x, self.weight, self.bias)


def attention(
    query: Float[Tensor, "n heads M d"],
    key: Float[Tensor, "n heads N d"],
    value: Float[Tensor, "n heads N d"],
    scale: float,
) -> Float[Tensor, "n heads M d"]:
    """softmax(QKᵀ·scale)·V with the fastest kernel for the device (docs/performance.md)."""
    # torch.jit checks a trace without gradients, so the trace must use the kernel used there.
    jit: Any = torch.jit
    slopes = torch.is_grad_enabled() and query.device.type == "cpu" and not jit.is_tracing()
    if slopes and (query.dtype == torch.bfloat16 or key.shape[2] <= PLAIN_TOKENS):
        return ((query * scale) @ key.transpose(-2, -1)).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def prepare(
    attn: Any,
    query: Float[Tensor, "n heads M d"],
    key: Float[Tensor, "n heads N d"],
    rotation: Rotation | None,
) -> tuple[Float[Tensor, "n heads M d"], Float[Tensor, "n heads N d"]]:
    """Apply the query and key norms of `attn`, then the rotation, if any."""
    query, key = attn.q_norm(query), attn.k_norm(key)
    if rotation is None:
        return query, key
    num_first = key.shape[2] - len(rotation[0])
    return _rotate(query, rotation, num_first), _rotate(key, rotation, num_first)


def _rotate(
    x: Float[Tensor, "n heads M d"], rotation: Rotation, num_first: int
) -> Float[Tensor, "n heads M d"]:
    """Rotate all but the first `num_first` tokens in the planes of features i and i + d/2 (RoPE, Su
    et al. 2021). Computed in the precision of `rotation`, returned in that of `x`.
    """
    first, rest = x[:, :, :num_first], x[:, :, num_first:]
    if not rest.shape[2]:
        return x
    sin, cos = (each[: rest.shape[2]] for each in rotation)
    low, high = rest.chunk(2, dim=-1)
    turned = rest * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([first, turned.to(x.dtype)], dim=2)


def is_bare(layer: nn.Module) -> bool:
    """Whether calling `layer` is equivalent to F.linear with its weight and bias: an nn.Linear or
    UnbiasedKeys, not a subclass, with a plain parameter as weight and without hooks.
    """
    linear = type(layer) in (nn.Linear, UnbiasedKeys)
    return linear and type(layer.weight) is nn.Parameter and not has_hooks(layer)


_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` has hooks, global ones included, or a replaced `forward`."""
    own = any(getattr(module, f"_{name}") for name in _HOOKS) or "forward" in vars(module)
    return own or any(getattr(every_module, f"_global_{name}") for name in _HOOKS)


class _ProjectAgain(torch.autograd.Function):
    """layer(act(x)) that saves x and recomputes act(x) in the backward pass: saves a quarter of a
    block's memory for 1/40 of its time.
    """

    @staticmethod
    def forward(
        ctx: Any, act: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
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
