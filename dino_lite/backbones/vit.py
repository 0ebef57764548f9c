"""Vision transformer: timm's layers in a forward pass of our own, with DINO's tokens, positions and
drop path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dino_lite.backbones.blocks import DropPathBy, DropRate
from dino_lite.backbones.transformer import Transformer, is_plain, timm_vit
from dino_lite.contracts import Traits, UserError
from dino_lite.settings.kinds import Count, KeywordsOf, NonNegative, Sides, Size
from dino_lite.settings.validate import checked


class ViT(Transformer):
    """A timm vision transformer with its own forward pass: mask → positions → registers → blocks →
    norm.

    `name` is a timm name, or "vit" with `embed_dim`, `depth` and `num_heads`; state-dict keys are
    timm's, which are also those of DINO's releases. `image_size`, in pixels per side or [rows,
    columns], is that of the learned positions. Image sides may be any multiple of the patch size:
    positions are resampled. Stochastic depth `drop_path` grows linearly with depth (DINO,
    section 3.2) unless `drop_path_uniform`; it drops single samples or, with `drop_path_by`
    "batch", a part of the batch, which saves its computation (DINOv2, section 5).
    `position_offset` and `position_antialias` select how the references resample positions (0.1
    and false for DINO's weights).

    Options of a DINOv2 ViT (sections 4 and 5): LayerScale (`init_values`), `num_registers` tokens
    without positions (Darcet et al. 2023; None: as in the named model), a gated `mlp` of two thirds
    the width ("swiglu"), and a `mask_token` that replaces masked patches.
    """

    kind = "vit"

    @checked
    def __init__(
        self,
        name: str = "vit",
        image_size: Size | Sides = 224,
        patch_size: Size = 16,
        in_chans: Size = 3,
        drop_path: DropRate = 0.0,
        position_offset: NonNegative = 0.0,
        position_antialias: bool = True,
        num_registers: Count | None = None,
        mask_token: bool = False,
        drop_path_by: DropPathBy = "sample",
        drop_path_uniform: bool = False,
        **architecture: Annotated[Any, KeywordsOf(timm_vit)],
    ) -> None:
        architecture = {key: value for key, value in architecture.items() if value is not None}
        rows, columns = sides_of(image_size)
        image_size = rows if rows == columns else [rows, columns]
        spec: dict[str, Any] = {
            "name": name,
            "image_size": image_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "position_offset": position_offset,
            "position_antialias": position_antialias,
            **architecture,
        }
        if rows % patch_size or columns % patch_size:
            raise UserError(
                f"backbone: image_size={image_size} must be a multiple of patch_size={patch_size}."
            )
        sizes: dict[str, Any] = {
            "img_size": (rows, columns),
            "patch_size": patch_size,
            "in_chans": in_chans,
        }
        model = timm_vit(name, num_registers, **sizes, drop_path_rate=drop_path, **architecture)
        self.grid = (rows // patch_size, columns // patch_size)
        if not (is_plain(model) and _has_positions(model, self.grid[0] * self.grid[1])):
            raise UserError(
                f"backbone.name={name} is not a plain vision transformer with one class token and "
                "learned positions: choose the timm name of one (vit_small_patch16_224), "
                'name="vit" with its sizes, or, for a DINOv3 model, backbone=rope with this name.'
            )
        uniform = drop_path if drop_path_uniform else None
        super().__init__(model, spec, mask_token, drop_path_by, uniform)
        self.position_offset, self.position_antialias = position_offset, position_antialias
        self.pos_embed = _with_class_position(model.pos_embed, self.cls_token, model.no_embed_class)

    @classmethod
    def traits(cls, name: str = "vit", **settings: Any) -> Traits:
        """`small` if given by sizes."""
        return Traits(small=name == "vit", names=("vit", "vit_small_patch16_224"))

    def embed(
        self, images: Float[Tensor, "n C H W"], mask: Bool[Tensor, "n P"] | None = None
    ) -> tuple[Float[Tensor, "n N D"], tuple[int, int]]:
        """Tokens before the first block, and their grid."""
        patches, grid = self.patches(images, mask)
        cls = self.cls_token.expand(images.shape[0], -1, -1)  # len() is a constant in a trace
        tokens = torch.cat([cls, patches], dim=1) + self.positions(grid)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(images.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        return tokens, grid

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 N D"]:
        """Position embedding for `grid`: the learned one, resampled if its grid differs
        (dino_family notes, A06).
        """
        if grid == self.grid:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        learned = patches.reshape(1, *self.grid, -1)
        return torch.cat([cls, self.resample(learned, grid)], dim=1)

    def fix_size(self, height: int, width: int) -> None:
        """Replace the position embedding by the one resampled for images of this size."""
        grid = (height // self.patch_size, width // self.patch_size)
        self.pos_embed, self.grid = nn.Parameter(self.positions(grid).detach()), grid

    def resample(
        self, learned: Float[Tensor, "1 rows columns D"], grid: tuple[int, int]
    ) -> Float[Tensor, "1 P D"]:
        """Resample a map of position vectors to `grid` by this backbone's rule (bicubic)."""
        cells = learned.permute(0, 3, 1, 2)  # 1 D rows columns
        size: dict[str, Any] = {"size": grid}
        if self.position_offset:
            # The reference passes (cells + 0.1) / cells to bicubic interpolation as scale, and
            # samples are placed by the scale, not by the sizes. The result differs by 11 % rms from
            # resampling by size, so released weights need it.
            own = cells.shape[-2:]
            size = {
                "scale_factor": [
                    (new + self.position_offset) / old for new, old in zip(grid, own, strict=True)
                ]
            }
        sampled = F.interpolate(cells, mode="bicubic", antialias=self.position_antialias, **size)
        return sampled.flatten(2).transpose(1, 2)


def sides_of(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of images of `image_size`, which may be one number for both."""
    rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    return rows, columns


def _with_class_position(
    positions: nn.Parameter, cls_token: nn.Parameter, without: bool
) -> nn.Parameter:
    """Positions "1 1+P D"; a model without one for its class token (`without`) gets zeros there."""
    if not without:
        return positions
    return nn.Parameter(torch.cat([torch.zeros_like(cls_token), positions.detach()], dim=1))


def _has_positions(model: Any, cells: int) -> bool:
    """Whether each patch has a learned position, and registers, if any, have none."""
    return (
        model.pos_embed is not None
        and model.pos_embed.shape[1] == cells + (not model.no_embed_class)
        and (model.no_embed_class or not model.num_reg_tokens)
    )
