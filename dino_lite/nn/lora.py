"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): the product of two thin matrices
beside each projection of attention is trained, while the network's own weights stay as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lite.contracts import Backbone, UserError
from dino_lite.settings.kinds import Must, Positive, Size
from dino_lite.settings.validate import checked

_ADAPTED = (".qkv", ".attn.proj")  # ends of the names of layers that get an adapter
_PARTS = ("lora_a", "lora_b", "lora_scale", "lora_dropout")


class LoRA:
    """Adds adapters of `rank` to the qkv and output projections of every block; all other weights
    of the backbone are frozen (section 4.1): y = W·x + b + alpha/rank·B·A·dropout(x), with B = 0 at
    the start, where the network is exactly the one without adapters.
    """

    @checked
    def __init__(
        self,
        rank: Size = 8,
        alpha: Positive = 16.0,
        dropout: Annotated[float, Must("a number in [0, 1)", lambda p: 0 <= p < 1)] = 0.0,
    ) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def __call__(self, backbone: Backbone) -> None:
        """Adapt `backbone`, in place. Raises UserError if it has no such projections."""
        layers = [part for name, part in backbone.named_modules() if name.endswith(_ADAPTED)]
        if not layers:
            raise UserError(
                f"adapter=lora: {type(backbone).__name__} has no qkv and output projections of "
                "attention: choose a vision transformer, or optim.last_blocks=1 instead."
            )
        backbone.requires_grad_(False)
        for layer in layers:
            self._adapt(layer)

    def _adapt(self, layer: Any) -> None:
        outputs, inputs = layer.weight.shape
        layer.lora_a = nn.Parameter(layer.weight.new_empty(self.rank, inputs))
        layer.lora_b = nn.Parameter(layer.weight.new_zeros(outputs, self.rank))
        nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))  # as the authors' code does
        # A buffer, so that a file of weights holds all that merging needs.
        scale = self.alpha / self.rank
        layer.register_buffer("lora_scale", layer.weight.new_tensor(scale))
        layer.lora_dropout = nn.Dropout(self.dropout)
        layer.__class__ = _with_adapter(type(layer))


class LowRank(nn.Module):
    """The part of an adapted layer beside its own class, whose names it keeps: `weight`, `bias`,
    and `lora_a` and `lora_b`.
    """

    is_adapted = True  # false: the layer without its adapter
    plain: type[nn.Module]
    weight: Tensor
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: Tensor
    lora_dropout: nn.Dropout

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own output and, unless switched off, the adapter's."""
        out: Tensor = super().forward(x)
        if not self.is_adapted:
            return out
        low = F.linear(self.lora_dropout(x), self.lora_a)
        return out + F.linear(low, self.lora_b) * self.lora_scale


_CLASSES: dict[Any, type[nn.Module]] = {}


def _with_adapter(plain: Any) -> type[nn.Module]:
    """The class of a layer of class `plain` with an adapter."""
    if plain not in _CLASSES:
        name = f"LowRank{plain.__name__}"
        _CLASSES[plain] = type(name, (LowRank, plain), {"plain": plain})
    return _CLASSES[plain]


def _adapted(network: nn.Module) -> list[LowRank]:
    return [part for part in network.modules() if isinstance(part, LowRank)]


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """Context in which `network` is as it was before it was adapted."""
    layers = _adapted(network)
    for layer in layers:
        layer.is_adapted = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_adapted = True


@torch.no_grad()
def merged(backbone: Backbone) -> Backbone:
    """A copy of an adapted backbone whose projections contain their adapters, as if it never had
    any; `backbone` itself if it has none.
    """
    if not _adapted(backbone):
        return backbone
    twin = copy.deepcopy(backbone)
    for layer in _adapted(twin):
        layer.weight.copy_(_merge(layer.weight, layer.lora_a, layer.lora_b, layer.lora_scale))
        for name in _PARTS:
            delattr(layer, name)
        layer.__class__ = cast(Any, layer.plain)
    return twin


def merged_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with the adapters in it merged, as far as their shapes agree."""
    found = dict(tensors)
    for name in tensors:
        layer, _, last = name.rpartition(".")
        parts = [f"{layer}.{part}" for part in ("weight", *_PARTS[:3])]
        if last == "lora_a" and all(part in tensors for part in parts):
            weight, a, b, scale = (tensors[part] for part in parts)
            if a.ndim == b.ndim == 2 and weight.shape == (len(b), a.shape[1]):
                found[parts[0]] = _merge(weight, a, b, scale)
                for part in parts[1:]:
                    del found[part]
    return found


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """weight + scale·b·a, computed in float64."""
    wide = weight.double() + scale.double() * (b.double() @ a.double())
    return wide.to(weight.dtype)


def is_of_adapter(name: str) -> bool:
    """Whether `name`, of a parameter or buffer, is of an adapter."""
    return name.rpartition(".")[2] in _PARTS
