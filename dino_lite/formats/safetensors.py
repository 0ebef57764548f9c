"""Exports a backbone to model.safetensors and config.json, and loads it without Hydra or a run."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.spec import empty_backbone
from dino_lite.contracts import Backbone, Trust, UserError
from dino_lite.data.plain_json import read_object
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.formats.opened import Opened
from dino_lite.formats.sound import (
    refuse_misfit,
    refuse_preprocessing,
    refuse_unsound,
    refusing,
)
from dino_lite.formats.tensors import read_file
from dino_lite.version import __version__

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_FORMAT = "dino_lite backbone"
_KEYS = ("spec", "embed_dim", "patch_size", "in_chans", "image_size", "mean", "std")
_LARGEST_DIFFERENCE = 1e-5


def export_safetensors(
    backbone: Backbone,
    directory: str | Path,
    *,
    normalize_mean: Sequence[float],
    normalize_std: Sequence[float],
    image_size: int,
    card: dict[str, Any],
    images: Float[Tensor, "n C H W"],
) -> dict[str, Any]:
    """Write the backbone to `directory`, load it from there, and compare the tokens of `images`.

    `images` are normalized floats; `card` (plain JSON) describes its training. Returns "directory",
    "files" and "largest_difference". Raises RuntimeError if that exceeds 1e-5, and UserError if the
    folder cannot be written.
    """
    directory = Path(directory).expanduser()
    # safetensors refuses tensors that share storage or are not contiguous
    weights = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in backbone.state_dict().items()
    }
    config = {
        "format": _FORMAT,
        "version": __version__,
        "spec": backbone.stored_spec(),
        "embed_dim": backbone.embed_dim,
        "patch_dim": _tokens(backbone, images[:1], torch.device("cpu"))[1].shape[2],
        "num_parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "patch_size": backbone.patch_size,
        "in_chans": backbone.in_chans,
        "image_size": image_size,
        "mean": [float(value) for value in normalize_mean],
        "std": [float(value) for value in normalize_std],
        "card": card,
    }
    text = json.dumps(config, indent=2) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(
            directory / WEIGHTS, lambda path: save_file(weights, path, metadata={"format": "pt"})
        )
        _write(directory / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot write the export to {directory}: {error}.") from error
    own = backbone.whole if isinstance(backbone, Compact) else backbone
    again = load_backbone(directory, trust=[type(own).__module__])
    difference = largest_difference(backbone, again, images)
    if not difference <= _LARGEST_DIFFERENCE:
        raise RuntimeError(
            f"the backbone loaded from {directory} differs by {difference:.2e} from the original"
        )
    return {
        "directory": str(directory),
        "files": [WEIGHTS, CONFIG],
        "largest_difference": difference,
    }


def open_export(directory: str | Path, trust: Trust = ()) -> Opened:
    """The backbone that `export_safetensors` wrote, with its metadata from config.json."""
    backbone, about = load_backbone(directory, trust), read_config(directory)
    size = (about["image_size"], about["image_size"])
    preprocessing = Preprocessing(size, tuple(about["mean"]), tuple(about["std"]))
    return Opened(backbone, preprocessing, about.get("card") or {})


@refusing("directory")
def load_backbone(directory: str | Path, trust: Trust = ()) -> Backbone:
    """The backbone that `export_safetensors` wrote: in eval mode, on the CPU, with saved dtypes.

    If its class belongs to a package other than dino_lite, that package is imported, which runs its
    code, only if `trust` names it. Raises UserError if it does not, or if the folder is invalid.
    """
    directory = Path(directory).expanduser()
    config = read_config(directory)
    path = directory / WEIGHTS
    if not path.is_file():
        raise UserError(f"{directory} has no {WEIGHTS}: export the backbone again.")
    weights = read_file(path, str(path))
    refuse_unsound(weights, str(path))
    backbone = empty_backbone(config["spec"], trust)
    refuse_misfit(backbone.state_dict(), weights, str(path))
    refuse_preprocessing(config, backbone.in_chans, str(directory / CONFIG))
    if any(parameter.is_meta for parameter in backbone.parameters()):
        backbone.to_empty(device="cpu")
    floats = [weight.dtype for weight in weights.values() if weight.is_floating_point()]
    if floats:
        backbone.to(floats[0])
    backbone.load_state_dict(weights)
    return backbone.eval()


def read_config(directory: str | Path) -> dict[str, Any]:
    """The content of an export's config.json: spec, sizes, mean, std and the card."""
    directory = Path(directory).expanduser()
    path = directory / CONFIG
    if not directory.is_dir():
        raise UserError(
            f"There is no folder {directory}: give the folder that `dino-lite export` wrote."
        )
    if not path.is_file():
        raise UserError(
            f"{directory} has no {CONFIG}: give the folder that `dino-lite export` wrote."
        )
    config = read_object(path)
    if config.get("format") != _FORMAT:
        raise UserError(
            f"{path} is not the config of a dino_lite backbone: give an exported folder."
        )
    missing = [key for key in _KEYS if key not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: export the backbone again.")
    return config


def largest_difference(
    first: Backbone, second: Backbone, images: Float[Tensor, "n C H W"]
) -> float:
    """Largest absolute difference between the tokens of two backbones for the same images."""
    device = next(first.parameters()).device
    one, two = (_tokens(network, images, device) for network in (first, second))
    pairs = zip(one, two, strict=True)
    return max(float((ours.double() - theirs.double()).abs().max()) for ours, theirs in pairs)


def _tokens(
    backbone: Backbone, images: Float[Tensor, "n C H W"], device: torch.device
) -> list[Tensor]:
    backbone = copy.deepcopy(backbone).eval().to(device)  # the original keeps its mode and device
    with torch.inference_mode():
        tokens = backbone(images.to(device, next(backbone.parameters()).dtype))
    return [part.cpu() for part in tokens[:3] if part is not None]  # cls, patches, registers


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: `write` fills a temporary file, which then replaces `path`."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink()
