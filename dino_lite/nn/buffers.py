"""Buffers of modules, kept so that a step can be undone on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool
from torch import Tensor, nn


class KeptBuffers:
    """Copies of the buffers of `modules`: running statistics of batch normalization, centers,
    queues. A forward pass may change them before its gradient turns out not to be finite.
    """

    @torch.no_grad()
    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._kept: dict[tuple[int, str], Tensor] = {}
        for group in _alike(self._named()):
            parts = torch.split(_joined(group.values()), [b.numel() for b in group.values()])
            self._kept.update(zip(group, parts, strict=True))

    @torch.no_grad()
    def restore_unless_(self, ok: Bool[Tensor, ""]) -> None:
        """Give the buffers their kept values if `ok` is false. Does not synchronize with a device;
        buffers that are new or have another size stay as they are.
        """
        if ok.is_cpu and ok:  # reading `ok` is free
            return
        named, kept = self._named(), self._kept
        same = {k: b for k, b in named.items() if k in kept and b.numel() == kept[k].numel()}
        for group in _alike(same):
            chosen = torch.where(ok, _joined(group.values()), torch.cat([kept[k] for k in group]))
            parts = torch.split(chosen, [b.numel() for b in group.values()])
            values = [part.view_as(b) for part, b in zip(parts, group.values(), strict=True)]
            torch._foreach_copy_(list(group.values()), values)

    def _named(self) -> dict[tuple[int, str], Tensor]:
        """All buffers. A module may have replaced one by a new tensor."""
        modules = enumerate(self._modules)
        return {(i, name): b for i, module in modules for name, b in module.named_buffers()}


def _alike(named: dict[tuple[int, str], Tensor]) -> Iterator[dict[tuple[int, str], Tensor]]:
    """`named` by dtype and device: few large kernels instead of many small ones."""
    for kind in dict.fromkeys((b.dtype, b.device) for b in named.values()):
        yield {key: b for key, b in named.items() if (b.dtype, b.device) == kind}


def _joined(buffers: Iterable[Tensor]) -> Tensor:
    """A copy of all elements, as one vector."""
    return torch.cat([buffer.reshape(-1) for buffer in buffers])
