"""Exports a backbone to model.safetensors and config.json, and loads it without Hydra or a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.spec import checked_spec, empty_backbone
from dino_lite.contracts import Backbone, Trust, UserError
from dino_lite.data.plain_json import read_object
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.transform import Transform
from dino_lite.formats.format import Claim, Format
from dino_lite.formats.opened import Opened
from dino_lite.formats.processors import read_preprocessing
from dino_lite.formats.reading import file_of
from dino_lite.formats.sound import (
    refuse_contradiction,
    refuse_larger,
    refuse_misfit,
    refuse_preprocessing,
    refuse_unsound,
    refusing,
    sizes_of,
)
from dino_lite.formats.tensors import read_file
from dino_lite.version import __version__

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_FORMAT = "dino_lite backbone"
_KEYS = ("spec", "embed_dim", "patch_size", "in_chans", "image_size", "mean", "std")


class SafeTensors(Format):
    """model.safetensors and config.json, for `dino_lite.load_backbone`. Holds every backbone."""

    name = "safetensors"
    library = "dino-lite"
    own = True

    def write(self, opened: Opened, folder: Path) -> list[Claim]:
        """Write both files, with the dtypes of the weights."""
        backbone, how = opened.backbone, opened.preprocessing
        own = backbone.whole if isinstance(backbone, Compact) else backbone
        # safetensors refuses tensors that share storage or are not contiguous
        weights = {
            name: tensor.detach().cpu().clone().contiguous()
            for name, tensor in backbone.state_dict().items()
        }
        config = {
            "format": _FORMAT,
            "version": __version__,
            "spec": backbone.stored_spec(),
            **sizes_of(backbone),
            "patch_dim": _patch_dim(backbone, how),
            "image_size": opened.image_size,
            "mean": list(opened.mean),
            "std": list(opened.std),
            "preprocessing": how._asdict(),
            "card": opened.card,
        }
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        package = own.kind.partition(":")[0] if ":" in own.kind else None
        trust = f", trust=[{package.partition('.')[0]!r}]" if package else ""
        return [
            Claim(
                load=f"import dino_lite\n\nbackbone = dino_lite.load_backbone(folder{trust})",
                run="tokens = backbone(pixels)\ncls, patches = tokens.cls, tokens.patches",
                sizes=(how.size,),
                any_size=package is None,  # the sizes of other packages' networks are not known
                tolerance=1e-5,
                read=f'pixels = backbone.transform("{file_of(backbone.in_chans)}")',
            )
        ]


def load_backbone(directory: str | Path, trust: Trust = ()) -> Backbone:
    """The backbone that `SafeTensors` wrote: in eval mode, on the CPU, with saved dtypes.
    Its attribute `transform` prepares images for it, as `data.transform.Transform` says.

    If its class belongs to a package other than dino_lite, that package is imported, which runs its
    code, only if `trust` names it. Raises UserError if it does not, or if the folder is invalid.
    """
    return open_export(directory, trust).backbone


@refusing("directory")
def open_export(directory: str | Path, trust: Trust = ()) -> Opened:
    """As `load_backbone`, with the metadata from config.json."""
    directory = Path(directory).expanduser()
    config = read_config(directory)
    path = directory / WEIGHTS
    if not path.is_file():
        raise UserError(f"{directory} has no {WEIGHTS}: export the backbone again.")
    weights, _ = read_file(path, str(path))
    refuse_larger(checked_spec(config["spec"]), weights, str(path))
    backbone = empty_backbone(config["spec"], trust)
    refuse_misfit(backbone.state_dict(), weights, str(path))
    refuse_unsound(weights, backbone.state_dict(), str(path))
    asked = str(directory / CONFIG)
    refuse_contradiction(config, sizes_of(backbone), asked, "its spec")
    refuse_preprocessing(config, backbone.in_chans, asked)
    if any(parameter.is_meta for parameter in backbone.parameters()):
        backbone.to_empty(device="cpu")
    floats = [weight.dtype for weight in weights.values() if weight.is_floating_point()]
    if floats:
        backbone.to(floats[0])
    backbone.load_state_dict(weights)
    size = (config["image_size"],) * 2
    how, _ = read_preprocessing(config, None, backbone, size, str(directory))
    told = {"image_size": how.size[0], "mean": [*how.mean], "std": [*how.std]}
    refuse_contradiction(config, told, asked, "its preprocessing")
    backbone.transform = Transform(how)
    return Opened(backbone.eval(), how, config.get("card") or {})


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


def _patch_dim(backbone: Backbone, how: Preprocessing) -> int:
    like = next(backbone.parameters())
    with torch.inference_mode():
        patches = backbone(like.new_zeros(1, backbone.in_chans, *how.size)).patches
    return int(patches.shape[2])
