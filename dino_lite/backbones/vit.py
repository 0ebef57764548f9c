"""Vision transformer: timm's parts in our own forward, with the tokens, positions and drop path
that DINO needs.
"""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.mlp import GluMlp, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dino_lite.backbones.blocks import DropPathBy, Memory, run_blocks
from dino_lite.contracts import Tokens, UserError


class ViT(nn.Module):
    """A timm vision transformer whose forward is written out: mask → positions → registers → blocks
    → norm.

    `name` is a timm name, or "vit" with `embed_dim`, `depth`, `num_heads` given; state-dict keys
    are timm's, which are those of DINO's releases. Any image size that the patch divides is taken:
    positions are resampled. Stochastic depth `drop_path` grows linearly with depth (DINO, section
    3.2), unless `drop_path_uniform`, and drops sample by sample or, with `drop_path_by` "batch", a
    part of the batch, whose work is then saved (DINOv2, section 5). `position_offset` and
    `position_antialias` are the reference's two ways of resampling positions (0.1 and false in
    DINO's weights).

    A DINOv2 ViT (sections 4 and 5) has LayerScale (`init_values`), perhaps `num_registers` tokens
    without positions (Darcet et al. 2023; None: as many as the named model has), an `mlp` of two
    thirds the width with a gate ("swiglu"), and a `mask_token`, which stands for masked patches.
    """

    def __init__(
        self,
        name: str = "vit",
        image_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        drop_path: float = 0.0,
        drop_path_by: DropPathBy = "sample",
        drop_path_uniform: bool = False,
        position_offset: float = 0.0,
        position_antialias: bool = True,
        num_registers: int | None = None,
        mask_token: bool = False,
        **architecture: Any,
    ) -> None:
        super().__init__()
        architecture = {key: value for key, value in architecture.items() if value is not None}
        self.spec: dict[str, Any] = {
            "name": name,
            "image_size": image_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "position_offset": position_offset,
            "position_antialias": position_antialias,
            **architecture,
        }
        if image_size % patch_size:
            raise UserError(
                f"backbone: image_size={image_size} is no multiple of patch_size={patch_size}."
            )
        sizes = {"img_size": image_size, "patch_size": patch_size, "in_chans": in_chans}
        model = _timm_vit(
            name, sizes | {"drop_path_rate": drop_path}, num_registers, **architecture
        )
        self.embed_dim, self.patch_size, self.in_chans = model.embed_dim, patch_size, in_chans
        self.position_offset, self.position_antialias = position_offset, position_antialias
        self.patch_embed, self.blocks, self.norm = model.patch_embed, model.blocks, model.norm
        self.drop_path_by: DropPathBy = drop_path_by
        if drop_path_uniform:
            for block in self.blocks:
                block.drop_path1 = block.drop_path2 = DropPath(drop_path)
        self.patch_embed.strict_img_size = False
        self.num_blocks = len(self.blocks)
        self.cls_token: nn.Parameter = model.cls_token
        self.pos_embed = _with_class_position(model.pos_embed, self.cls_token, model.no_embed_class)
        self.register_tokens: nn.Parameter | None = model.reg_token
        self.num_registers = self.spec["num_registers"] = model.num_reg_tokens
        nothing = torch.zeros(1, self.embed_dim)
        self.mask_token: nn.Parameter | None = nn.Parameter(nothing) if mask_token else None
        self.spec["mask_token"] = mask_token
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.memory: Memory = "normal"  # see run_blocks; it and `compiled` change no result
        self.compiled = False

    def forward(
        self,
        images: Float[Tensor, "n C H W"],
        mask: Bool[Tensor, "n P"] | None = None,
        cls_only: bool = False,
    ) -> Tokens:
        """Tokens after the last norm. Patches in `mask` are the mask token's before they get their
        positions (masked image modeling). With `cls_only` the last block does nothing that only
        patches and registers need: both come back empty.
        """
        tokens, grid = self.embed(images, mask)
        return self._tokens(self._run(tokens, last_queries=1 if cls_only else None), grid)

    def embed(
        self, images: Float[Tensor, "n C H W"], mask: Bool[Tensor, "n P"] | None = None
    ) -> tuple[Float[Tensor, "n N D"], tuple[int, int]]:
        """Tokens before the first block, and their grid."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"images of {height}x{width} pixels do not divide into patches of "
                f"{self.patch_size}: "
                "choose a crop size that is a multiple of backbone.patch_size."
            )
        grid = (height // self.patch_size, width // self.patch_size)
        patches = self.patch_embed.proj(images).flatten(2).transpose(1, 2)  # n P D
        if mask is not None:
            if self.mask_token is None:
                raise NotImplementedError("this backbone has no mask token: set mask_token=true")
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        cls = self.cls_token.expand(len(images), -1, -1)
        tokens = torch.cat([cls, patches], dim=1) + self.positions(grid)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(len(images), -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        return tokens, grid

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 N D"]:
        """Position embedding for `grid`: the learned one where it fits, else resampled (dino_family
        notes, A06).
        """
        if grid == self.grid:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        learned = patches.reshape(1, *self.grid, -1)
        return torch.cat([cls, self.resample(learned, grid)], dim=1)

    def resample(
        self, learned: Float[Tensor, "1 rows columns D"], grid: tuple[int, int]
    ) -> Float[Tensor, "1 P D"]:
        """A map of position vectors at `grid`, by this backbone's rule (bicubic)."""
        cells = learned.permute(0, 3, 1, 2)  # 1 D rows columns
        size: dict[str, Any] = {"size": grid}
        if self.position_offset:
            # The reference hands bicubic interpolation (cells + 0.1) / cells as scale, and the
            # scale, not the sizes, places the samples: 11 % rms apart from resampling by size, so
            # released weights need it.
            own = cells.shape[-2:]
            size = {
                "scale_factor": [
                    (new + self.position_offset) / old for new, old in zip(grid, own, strict=True)
                ]
            }
        sampled = F.interpolate(cells, mode="bicubic", antialias=self.position_antialias, **size)
        return sampled.flatten(2).transpose(1, 2)

    def intermediate(self, images: Float[Tensor, "n C H W"], blocks: list[int]) -> list[Tokens]:
        """Tokens after each of `blocks`, in the order asked for; negative numbers count from the
        last block.
        """
        wanted = [range(len(self.blocks))[i] for i in blocks]
        tokens, grid = self.embed(images)
        found: dict[int, Tokens] = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            tokens = self._run(tokens, [block])
            if i in wanted:
                found[i] = self._tokens(tokens, grid)
        return [found[i] for i in wanted]

    def attention(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n heads N N"]:
        """Softmax attention of the last block, rows sum to one; token 0 is the class token, the
        next are registers, the last patches.
        """
        tokens, _ = self.embed(images)
        tokens = self._run(tokens, self.blocks[:-1])
        last: Any = self.blocks[-1]
        qkv = last.attn.qkv(last.norm1(tokens)).unflatten(-1, (3, last.attn.num_heads, -1))
        query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # n heads N D/heads
        query, key = last.attn.q_norm(query), last.attn.k_norm(key)
        weights: Tensor = (query @ key.transpose(-2, -1) * last.attn.scale).softmax(dim=-1)
        return weights

    def depth_of(self, name: str) -> int:
        """Layer of the parameter `name`: 0 stem, i+1 block i, depth+1 the last norm."""
        first, *rest = name.split(".")
        if first == "blocks":
            return int(rest[0]) + 1
        return len(self.blocks) + 1 if first == "norm" else 0

    def _run(self, tokens: Tensor, blocks: Any = None, last_queries: int | None = None) -> Tensor:
        blocks = list(self.blocks if blocks is None else blocks)
        settings = (last_queries, self.memory, self.compiled, self.drop_path_by)
        return run_blocks(blocks, tokens, *settings)

    def _tokens(self, tokens: Float[Tensor, "n N D"], grid: tuple[int, int]) -> Tokens:
        tokens, first = self.norm(tokens), 1 + self.num_registers
        registers = tokens[:, 1:first] if self.num_registers else None
        return Tokens(tokens[:, 0], tokens[:, first:], registers, grid)


def _timm_vit(
    name: str,
    sizes: dict[str, Any],
    num_registers: int | None = None,
    mlp: str | None = None,
    norm_eps: float | None = None,
    **architecture: Any,
) -> Any:
    """The timm model whose parts we take, without classifier; refuses what our forward would not
    reproduce.
    """
    kwargs = {**sizes, "num_classes": 0, **architecture}
    if num_registers is not None:
        kwargs["reg_tokens"] = num_registers
    if num_registers:
        kwargs["no_embed_class"] = True
    if mlp not in (None, "gelu", "swiglu"):
        raise UserError(f"backbone.mlp={mlp}: choose gelu or swiglu.")
    if mlp == "swiglu":
        kwargs["mlp_layer"] = _swiglu
    if norm_eps is not None:
        kwargs["norm_layer"] = functools.partial(nn.LayerNorm, eps=norm_eps)
    try:
        model: Any = (
            VisionTransformer(**kwargs) if name == "vit" else timm.create_model(name, **kwargs)
        )
    except (RuntimeError, TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        reason = error if str(error) else type(error).__name__
        raise UserError(f"backbone.name={name} cannot be built: {reason}.") from error
    if not _is_plain(model, (sizes["img_size"] // sizes["patch_size"]) ** 2):
        raise UserError(
            f"backbone.name={name} is no plain vision transformer with one class token and learned "
            'positions; choose such a timm name (vit_small_patch16_224) or name="vit" with its '
            "sizes."
        )
    for block in model.blocks:
        if isinstance(block.mlp, GluMlp):  # timm starts half of it near zero, DINOv2 all alike
            nn.init.trunc_normal_(block.mlp.fc1.weight, std=0.02)
            if block.mlp.fc1.bias is not None:
                nn.init.zeros_(block.mlp.fc1.bias)
    return model


def _swiglu(in_features: int, hidden_features: int, **settings: Any) -> GluMlp:
    """DINOv2's gated MLP: two thirds of a plain one's width, so that it has as many weights, in
    whole eights.
    """
    width = (int(hidden_features * 2 / 3) + 7) // 8 * 8
    settings = settings | {"act_layer": nn.SiLU, "gate_last": False}
    return GluMlp(in_features, 2 * width, **settings)


def _with_class_position(
    positions: nn.Parameter, cls_token: nn.Parameter, without: bool
) -> nn.Parameter:
    """Positions "1 1+P D" of a model that has none for its class token: ours is zero there."""
    if not without:
        return positions
    return nn.Parameter(torch.cat([torch.zeros_like(cls_token), positions.detach()], dim=1))


def _is_plain(model: Any, cells: int) -> bool:
    """True where our forward is the model's own: class token, its position, registers without one,
    blocks, last norm.
    """
    return (
        isinstance(model, VisionTransformer)
        and model.cls_token is not None
        and model.num_prefix_tokens == 1 + model.num_reg_tokens
        and model.pos_embed is not None
        and model.pos_embed.shape[1] == cells + (not model.no_embed_class)
        and (model.no_embed_class or not model.num_reg_tokens)
        and len(model.blocks) > 0
        and all(_is_plain_block(block) for block in model.blocks)
        and isinstance(model.norm_pre, nn.Identity)
        and not isinstance(model.norm, nn.Identity)
        and isinstance(model.patch_drop, nn.Identity)
        and not getattr(model.pos_drop, "p", 0.0)
    )


def _is_plain_block(block: Any) -> bool:
    """True where backbones/blocks.py does what the block's own forward does."""
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    return (
        type(block) is Block
        and type(attn) is Attention
        and (type(mlp) is Mlp or (type(mlp) is GluMlp and not mlp.gate_last))
        and isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity)
        and getattr(attn, "gate", None) is None
        and isinstance(mlp.norm, nn.Identity)
        and isinstance(mlp.fc1, nn.Linear)
        and not any(part.p for part in block.modules() if isinstance(part, nn.Dropout))
    )
