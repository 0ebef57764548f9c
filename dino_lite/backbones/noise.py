"""Whether a backbone's tokens differ between training and eval mode."""

from __future__ import annotations

from timm.layers.drop import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RotaryPositions
from dino_lite.backbones.transformer import Transformer
from dino_lite.contracts import Backbone


def is_noisy(backbone: Backbone) -> bool:
    """Whether an image's tokens may differ between training and eval mode, as of any backbone of
    another package.
    """
    return not isinstance(backbone, Transformer | ConvNet | Compact) or any(
        map(_draws, backbone.modules())
    )


def _draws(part: nn.Module) -> bool:
    if isinstance(part, DropPath):
        return bool(part.drop_prob)
    if isinstance(part, _DropoutNd):
        return part.p > 0
    return isinstance(part, _BatchNorm) or (isinstance(part, RotaryPositions) and part.is_noisy)
