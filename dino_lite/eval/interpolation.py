"""Networks on the line between two with the same weights' names and shapes.

Wortsman et al. 2022 (arXiv 2109.01903, section 3): weights between a network and its fine-tuned
copy keep much of what the first knew and most of what the second gained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dino_lite.contracts import Backbone

ALPHAS = tuple(step / 10 for step in range(11))  # 0: the start, 1: the end

State = Mapping[str, Tensor]


def between(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    """(1-alpha)·start + alpha·end, computed in float64 and rounded to the dtype of `end`. Bit-equal
    to the start at 0 and to the end at 1; between them, integers and truth values are the end's.
    """
    if start.keys() != end.keys():
        raise ValueError(f"different weights: {sorted(start.keys() ^ end.keys())[:3]}")
    if alpha in (0, 1):
        return {name: value.clone() for name, value in (end if alpha else start).items()}

    def mixed(one: Tensor, other: Tensor) -> Tensor:
        if not other.is_floating_point():
            return other.clone()
        return ((1 - alpha) * one.double() + alpha * other.double()).to(other.dtype)

    return {name: mixed(start[name], value) for name, value in end.items()}


def network_at(start: Backbone, end: Backbone, alpha: float) -> Backbone:
    """The network `between` two, in eval mode. Its statistics of batch normalization, unless alpha
    is 0 or 1, are still to be estimated: those of the line are not on the line.
    """
    network = copy.deepcopy(end).eval()
    network.load_state_dict(between(start.state_dict(), end.state_dict(), alpha))
    return network


@torch.no_grad()
def estimate_statistics(network: Backbone, batches: Iterable[Float[Tensor, "n C H W"]]) -> None:
    """Replace the running statistics of all batch normalization by the mean and the unbiased
    variance of what its layers get over all `batches`, summed in float64: each image counts the
    same, whatever the sizes of the batches. The layers normalize by their batch meanwhile, as in
    training; everything else is as in eval mode.
    """
    layers = [
        part
        for part in network.modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    ]
    if not layers:
        return
    sums = [torch.zeros(3, layer.num_features, dtype=torch.float64) for layer in layers]

    def watch(layer: _BatchNorm, total: Tensor) -> torch.utils.hooks.RemovableHandle:
        def add(_: object, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            x = x.to(torch.float32 if x.is_mps else torch.float64).transpose(0, 1).flatten(1)
            num = torch.full_like(x[:, 0], x.shape[1])
            total.add_(torch.stack([num, x.sum(1), x.square().sum(1)]).cpu())  # 3 C

        return layer.register_forward_pre_hook(add)

    counts = [copy.deepcopy(layer.num_batches_tracked) for layer in layers]
    hooks = [watch(layer, total) for layer, total in zip(layers, sums, strict=True)]
    network.eval()
    for layer in layers:
        layer.training = True
    try:
        for images in batches:
            network(images, cls_only=True)
    finally:
        network.eval()
        for hook in hooks:
            hook.remove()
    for layer, count, (num, total, squares) in zip(layers, counts, sums, strict=True):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.num_batches_tracked = count
        mean = total / num
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((squares - num * mean.square()) / (num - 1).clamp(min=1))
