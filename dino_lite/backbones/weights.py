"""Backbone weights from a file: an exported backbone, or a timm checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError

_CLASSIFIERS = ("head.", "head_dist.", "fc_norm.", "fc.")


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


def load_pretrained(backbone: nn.Module, path: str | Path) -> list[str]:
    """Fill `backbone` with the weights in `path`, strictly; returns the names left unused (a
    classifier's).

    A position embedding of another grid is resampled by the backbone's own rule. Anything else that
    does not fit is refused: half-loaded weights are the worst kind.
    """
    weights = read_weights(path)
    unused = [name for name in weights if name.startswith(_CLASSIFIERS)]
    weights = {name: value for name, value in weights.items() if name not in unused}
    own = backbone.state_dict()
    if isinstance(backbone, ViT) and "pos_embed" in weights:
        weights["pos_embed"] = _fit_positions(weights["pos_embed"], backbone)
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
    return unused


def _fit_positions(learned: Tensor, backbone: ViT) -> Tensor:
    """Resample a [1, 1+cells, D] position embedding of a square grid to the backbone's grid."""
    cells = round((learned.shape[1] - 1) ** 0.5)
    if learned.shape == backbone.pos_embed.shape or cells * cells != learned.shape[1] - 1:
        return learned
    square = learned[:, 1:].float().reshape(1, cells, cells, -1)
    sampled = backbone.resample(square, backbone.grid).to(learned.dtype)
    return torch.cat([learned[:, :1], sampled], dim=1)
