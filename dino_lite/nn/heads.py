"""The projection head: an MLP to a bottleneck, and prototypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino_lite.contracts import Prototypes
from dino_lite.settings.kinds import Count, Size


class LastLayer(nn.Module):
    """K prototypes with norms `weight_g` and directions `weight_v`: weight normalization written
    out, so that the module can be deep-copied.

    `learn_norm=False` fixes the norms at 1 (the reference's norm_last_layer=True). State-dict keys
    are the reference's.
    """

    def __init__(self, bottleneck_dim: int, num_prototypes: int, learn_norm: bool = False) -> None:
        super().__init__()
        # nn.Linear's default U(±1/√E), as in the reference, which creates this layer after its own
        # initialization.
        self.weight_v = nn.Parameter(
            nn.Linear(bottleneck_dim, num_prototypes, bias=False).weight.detach()
        )
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=learn_norm)

    def forward(self) -> Prototypes:
        return Prototypes(self.weight_v, self.weight_g)


class PlainLayer(nn.Module):
    """K prototypes without weight normalization: the weight of a linear layer (DINOv3)."""

    def __init__(self, bottleneck_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self) -> Prototypes:
        return Prototypes(self.weight)


class DINOHead(nn.Module):
    """MLP to an L2-normalized bottleneck, then prototypes (DINO, section 3.1 and appendix C).

    `forward` returns the bottleneck z; losses and centering compute the logits z·Pᵀ themselves.
    With `num_prototypes=0` the head has no prototypes. With `plain`, prototypes are not
    weight-normalized.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: Count,
        hidden_dim: Size = 2048,
        bottleneck_dim: Size = 256,
        num_layers: Size = 3,
        batch_norm: bool = False,
        learn_norm: bool = False,
        plain: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for i in range(num_layers):
            layers.append(nn.Linear(widths[i], widths[i + 1]))
            nn.init.trunc_normal_(layers[-1].weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
            if i < num_layers - 1:
                layers += [nn.BatchNorm1d(widths[i + 1])] if batch_norm else []
                layers.append(nn.GELU())
        self.mlp = layers[0] if num_layers == 1 else nn.Sequential(*layers)
        self.num_prototypes, self.bottleneck_dim = num_prototypes, bottleneck_dim
        self.in_dim = in_dim
        self.last_layer: LastLayer | PlainLayer | None = None
        if num_prototypes and plain:
            self.last_layer = PlainLayer(bottleneck_dim, num_prototypes)
        elif num_prototypes:
            self.last_layer = LastLayer(bottleneck_dim, num_prototypes, learn_norm)

    @staticmethod
    def mixes_images(settings: Mapping[str, Any]) -> bool:
        """True with batch normalization, whose statistics are those of a micro-batch."""
        return bool(settings["batch_norm"])

    def forward(self, features: Float[Tensor, "n D"]) -> Float[Tensor, "n E"]:
        # Normalized in at least float32: half precision would give norms that are off by 1e-3.
        bottleneck = self.mlp(features)
        wide = bottleneck.to(torch.promote_types(bottleneck.dtype, torch.float32))
        return F.normalize(wide, dim=-1, eps=1e-12)

    def prototypes(self) -> Prototypes:
        """The K prototypes; "0 E" if the head has none."""
        if self.last_layer is None:
            return Prototypes(next(self.parameters()).new_zeros(0, self.bottleneck_dim))
        prototypes: Prototypes = self.last_layer()
        return prototypes
