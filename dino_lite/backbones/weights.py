"""Backbone weights from a file: an exported backbone, or a timm checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError

_CLASSIFIERS = ("head.", "head_dist.", "fc_norm.", "fc.")
_STEM = "patch_embed.proj.weight"  # "D C p p": the one weight that knows the images' channels


class Fit(NamedTuple):
    """Names of weights in a file that were left unused, and of those that had to be adapted."""

    unused: list[str]
    adapted: list[str]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, a torch file (never unpickled freely) or an exported
    folder.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise UserError(
            f"backbone.pretrained={path}: there is no such file; name a checkpoint or an "
            "exported folder."
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"backbone.pretrained={path} cannot be read as weights ({type(error).__name__}): "
            "give a .safetensors file or a plain state dict saved by torch.save."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"backbone.pretrained={path} holds no state dict of tensors.")
    return content


def load_pretrained(backbone: nn.Module, path: str | Path) -> Fit:
    """Fill `backbone` with the weights in `path`, strictly; a classifier's are left unused.

    A position embedding of another grid is resampled by the backbone's own rule; a first
    convolution of RGB is adapted to other channels as timm does it. Anything else that does not fit
    is refused: half-loaded weights are the worst kind.
    """
    file = read_weights(path)
    unused = [name for name in file if name.startswith(_CLASSIFIERS)]
    weights = {name: value for name, value in file.items() if name not in unused}
    own = backbone.state_dict()
    if isinstance(backbone, ViT) and "pos_embed" in weights:
        weights["pos_embed"] = _fit_positions(weights["pos_embed"], backbone)
    if _STEM in weights and _STEM in own:
        weights[_STEM] = _fit_channels(weights[_STEM], own[_STEM].shape[1], path)
    missing = sorted(own.keys() - weights.keys())
    extra = sorted(weights.keys() - own.keys())
    wrong = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    if missing or extra or wrong:
        n = (missing or extra or wrong)[0]
        shapes = (
            f" ({tuple(weights[n].shape)} in the file, {tuple(own[n].shape)} here)"
            if wrong == [n]
            else ""
        )
        raise UserError(
            f"backbone.pretrained={path} does not fit the backbone: {len(missing)} weights "
            f"missing, {len(extra)} "
            f"unknown, {len(wrong)} of another shape, the first {n}{shapes}; choose the "
            "backbone it was made for."
        )
    backbone.load_state_dict(weights)
    return Fit(unused, [name for name in weights if weights[name] is not file[name]])


def _fit_channels(learned: Tensor, in_chans: int, path: str | Path) -> Tensor:
    """The first convolution for `in_chans` channels: of RGB's weights the sum, for a gray image is
    one repeated, or RGB's in turn, scaled so that as much comes out.
    """
    found = learned.shape[1] if learned.ndim == 4 else in_chans
    if found == in_chans:
        return learned
    if found != 3:
        raise UserError(
            f"backbone.pretrained={path} takes images of {found} channels, the backbone "
            f"{in_chans}: only weights for 3 can be adapted, so set data.channels={found}."
        )
    adapted: Tensor = adapt_input_conv(in_chans, learned)
    return adapted


def _fit_positions(learned: Tensor, backbone: ViT) -> Tensor:
    """Resample a [1, 1+cells, D] position embedding of a square grid to the backbone's grid."""
    cells = round((learned.shape[1] - 1) ** 0.5)
    if learned.shape == backbone.pos_embed.shape or cells * cells != learned.shape[1] - 1:
        return learned
    square = learned[:, 1:].float().reshape(1, cells, cells, -1)
    sampled = backbone.resample(square, backbone.grid).to(learned.dtype)
    return torch.cat([learned[:, :1], sampled], dim=1)
