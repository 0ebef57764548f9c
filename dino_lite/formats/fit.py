"""Loads weights into a backbone whose channels, patches or positions may differ from theirs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor

from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.transformer import Transformer
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Backbone, UserError
from dino_lite.formats.convnets import shaped, stem_of
from dino_lite.formats.grids import STEM, Grid
from dino_lite.formats.layouts import Found
from dino_lite.formats.opened import Fit
from dino_lite.formats.sound import refuse_unsound
from dino_lite.settings.validate import shown
from dino_lite.wording import count


class Fitted(NamedTuple):
    """A weight as a backbone needs it, and one clause on how it was converted, if it was."""

    value: Tensor
    said: str = ""


def fill(backbone: Backbone, found: Found, asked: str, may_be_fresh: bool = False) -> Fit:
    """Load the weights of `found`, adapted to channels, patch size and grid, or raise UserError if
    any weight is missing, unknown or of another shape. With `may_be_fresh`, a mask token that the
    weights lack keeps its initial value.
    """
    own, unused = backbone.state_dict(), list(found.read.unused)
    if isinstance(backbone, ConvNet):
        found = found._replace(read=found.read._replace(weights=shaped(found.weights, own)))
    weights = dict(found.weights)
    said: list[str] = []
    if "mask_token" not in own and weights.pop("mask_token", None) is not None:
        unused.append("mask_token")
    if may_be_fresh and "mask_token" in own and "mask_token" not in weights:
        weights["mask_token"] = own["mask_token"]
        said.append("the mask token starts fresh, since the file has none")
    for name in [n for n in weights if n.endswith(("q_bias", "v_bias")) and n not in own]:
        if not weights[name].any():  # most DINOv3 models have biases that are zero
            del weights[name]
            unused.append(name)
    for fit in (fit_patches, fit_channels) if STEM in weights else ():
        weights[STEM], clause = fit(weights[STEM], backbone, asked)
        said.append(clause)
    if (stem := stem_of(weights)) is not None:
        weights[stem], clause = fit_channels(weights[stem], backbone, asked)
        said.append(clause.replace("patch embedding", "first convolution"))
    if "pos_embed" in weights and isinstance(backbone, ViT):
        weights["pos_embed"], clause = fit_positions(weights["pos_embed"], backbone, found.grid)
        said.append(clause)
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
            f"{asked} does not fit the backbone: {count(len(missing), 'weight')} "
            f"missing, {len(extra)} "
            f"unknown, {len(wrong)} of another shape, the first {n}{shapes}; choose the "
            "backbone it was made for."
        )
    refuse_unsound(weights, own, asked)
    if next(iter(own.values())).is_meta:  # no memory is taken for weights that do not fit
        backbone.to_empty(device="cpu")
    backbone.load_state_dict(weights)
    kept = found.weights
    changed = [
        n for n in weights if n in kept and (n in found.adapted or weights[n] is not kept[n])
    ]
    said = [clause for clause in said if clause]
    return Fit(found.read.owner, found.read.why, len(own), unused, changed, tuple(said))


def compare_settings(
    backbone: Transformer, theirs: Any, activation_told: bool, asked: str
) -> tuple[str, ...]:
    """One clause on each setting that no weight shows, of norms and positions, in which `backbone`
    differs from `theirs`, the network that the weights in `asked` are of. Raises UserError if the
    number of heads differs, or the activation, if it is told.
    """
    own: Any = backbone
    first, its = own.blocks[0], theirs.blocks[0]
    if first.attn.num_heads != its.attn.num_heads:
        raise UserError(
            f"{asked} was trained with {its.attn.num_heads} heads, and the backbone has "
            f"{first.attn.num_heads}: set backbone.num_heads={its.attn.num_heads}."
        )
    acts = [_activation(block.mlp.act) for block in (first, its)]
    if activation_told and acts[0] != acts[1]:
        raise UserError(
            f"{asked} was trained with {acts[1]}, and the backbone has {acts[0]}: choose the "
            "backbone it was made for."
        )
    there = _settings(theirs)
    return tuple(
        f"{name} is {shown(value)} here, {shown(there[name])} in the network the weights are of"
        for name, value in _settings(own).items()
        if value != there[name]
    )


def _activation(act: Any) -> str:
    approximate = getattr(act, "approximate", "none")
    return type(act).__name__ + ("" if approximate == "none" else f" ({approximate})")


def _settings(backbone: Any) -> dict[str, Any]:
    """Settings of norms and positions."""
    norms = {"norm_eps": backbone.norm.eps}
    if isinstance(backbone, RoPEViT):
        where = backbone.positions
        return norms | {"rope_base": where.base, "rope_normalize_coords": where.normalizer}
    names = ("position_offset", "position_antialias")
    return norms | {name: getattr(backbone, name) for name in names}


def fit_patches(learned: Tensor, backbone: Backbone, asked: str) -> Fitted:
    """Resample a patch embedding "D C h w" to the backbone's patch size by the pseudo-inverse of
    bicubic resizing: an image whose patches are enlarged is embedded as before (FlexiViT, Beyer et
    al. 2023, section 3.4); in one whose patches are reduced, the squared error is least.
    """
    new = (backbone.patch_size, backbone.patch_size)
    if learned.ndim != 4 or learned.shape[-2:] == new:
        return Fitted(learned)
    old = " x ".join(str(side) for side in sorted(set(learned.shape[-2:])))
    said = f"patch embedding {old}→{new[0]} px by pseudo-inverse resize"
    return Fitted(resample_patch_embed(learned, [*new]), said)


def fit_channels(learned: Tensor, backbone: Backbone, asked: str) -> Fitted:
    """Adapt the patch embedding from RGB to the backbone's channels: the sum of RGB's weights for
    one channel, else RGB's weights repeated and scaled by 3 / channels.
    """
    in_chans = backbone.in_chans
    found = learned.shape[1] if learned.ndim == 4 else in_chans
    if found == in_chans:
        return Fitted(learned)
    if found != 3:
        raise UserError(
            f"{asked} takes images of {count(found, 'channel')}, the backbone "
            f"{in_chans}: only weights for 3 can be adapted, so set data.channels={found}."
        )
    how = "summed" if in_chans == 1 else f"repeated and scaled by 3/{in_chans}"
    said = f"patch embedding 3→{count(in_chans, 'channel')}, the weights of RGB {how}"
    return Fitted(adapt_input_conv(in_chans, learned), said)


def fit_positions(learned: Tensor, backbone: ViT, grid: Grid | None) -> Fitted:
    """Resample a position embedding "1 1+cells D" of `grid` to the backbone's grid, by its rule."""
    if grid is None or (grid.rows, grid.columns) == backbone.grid:
        return Fitted(learned)
    cells = learned[:, 1:].float().reshape(1, grid.rows, grid.columns, -1)
    sampled = backbone.resample(cells, backbone.grid).to(learned.dtype)
    new = "x".join(map(str, backbone.grid))
    said = f"positions {grid.rows}x{grid.columns}→{new}, bicubic"
    return Fitted(torch.cat([learned[:, :1], sampled], dim=1), said)
