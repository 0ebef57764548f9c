"""Vision transformer: timm's parts in our own forward, with the tokens, positions and drop path
that DINO needs.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dino_lite.backbones.blocks import Memory, run_blocks
from dino_lite.contracts import Tokens, UserError


class ViT(nn.Module):
    """A timm vision transformer whose forward is written out: mask → positions → registers → blocks
    → norm.

    `name` is a timm name, or "vit" with `embed_dim`, `depth`, `num_heads` given; state-dict keys
    are timm's, which are those of DINO's releases. Any image size that the patch divides is taken:
    positions are resampled. Stochastic depth `drop_path` grows linearly with depth, per sample
    (DINO, section 3.2). `position_offset` and `position_antialias` are the reference's two ways of
    resampling positions (0.1 and false in DINO's weights).
    """

    def __init__(
        self,
        name: str = "vit",
        image_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        drop_path: float = 0.0,
        position_offset: float = 0.0,
        position_antialias: bool = True,
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
        model = _timm_vit(name, image_size, patch_size, in_chans, drop_path, architecture)
        self.embed_dim, self.patch_size, self.in_chans = model.embed_dim, patch_size, in_chans
        self.position_offset, self.position_antialias = position_offset, position_antialias
        self.patch_embed, self.blocks, self.norm = model.patch_embed, model.blocks, model.norm
        self.patch_embed.strict_img_size = False
        self.num_blocks = len(self.blocks)
        self.cls_token: nn.Parameter = model.cls_token
        self.pos_embed: nn.Parameter = model.pos_embed
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.memory: Memory = "normal"  # see run_blocks; it and `compiled` change no result
        self.compiled = False

    def forward(
        self,
        images: Float[Tensor, "n C H W"],
        mask: Bool[Tensor, "n P"] | None = None,
        cls_only: bool = False,
    ) -> Tokens:
        """Tokens after the last norm. `mask` belongs to masked image modeling and is refused until
        it is built. With `cls_only` the last block does nothing that only patches need.
        """
        tokens, grid = self.embed(images, mask)
        return self._tokens(self._run(tokens, last_queries=1 if cls_only else None), grid)

    def embed(
        self, images: Float[Tensor, "n C H W"], mask: Bool[Tensor, "n P"] | None = None
    ) -> tuple[Float[Tensor, "n N D"], tuple[int, int]]:
        """Tokens before the first block, and their grid."""
        if mask is not None:
            raise NotImplementedError("this backbone has no mask token")
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"images of {height}x{width} pixels do not divide into patches of "
                f"{self.patch_size}: "
                "choose a crop size that is a multiple of backbone.patch_size."
            )
        grid = (height // self.patch_size, width // self.patch_size)
        patches = self.patch_embed.proj(images).flatten(2).transpose(1, 2)  # n P D
        cls = self.cls_token.expand(len(images), -1, -1)
        return torch.cat([cls, patches], dim=1) + self.positions(grid), grid

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
        """Softmax attention of the last block, rows sum to one; token 0 is the class token."""
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
        return run_blocks(blocks, tokens, last_queries, self.memory, self.compiled)

    def _tokens(self, tokens: Float[Tensor, "n N D"], grid: tuple[int, int]) -> Tokens:
        tokens = self.norm(tokens)
        return Tokens(cls=tokens[:, 0], patches=tokens[:, 1:], registers=None, grid=grid)


def _timm_vit(
    name: str,
    image_size: int,
    patch_size: int,
    in_chans: int,
    drop_path: float,
    architecture: dict[str, Any],
) -> Any:
    """The timm model whose parts we take, without classifier; refuses what our forward would not
    reproduce.
    """
    kwargs = {
        "img_size": image_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "drop_path_rate": drop_path,
        "num_classes": 0,
        **architecture,
    }
    try:
        model: Any = (
            VisionTransformer(**kwargs) if name == "vit" else timm.create_model(name, **kwargs)
        )
    except (RuntimeError, TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        reason = error if str(error) else type(error).__name__
        raise UserError(f"backbone.name={name} cannot be built: {reason}.") from error
    if not _is_plain(model, (image_size // patch_size) ** 2):
        raise UserError(
            f"backbone.name={name} is no plain vision transformer with one class token and learned "
            'positions; choose such a timm name (vit_small_patch16_224) or name="vit" with its '
            "sizes."
        )
    return model


def _is_plain(model: Any, cells: int) -> bool:
    """True where our forward is the model's own: class token, its position, blocks, last norm."""
    return (
        isinstance(model, VisionTransformer)
        and model.cls_token is not None
        and model.num_prefix_tokens == 1
        and model.pos_embed is not None
        and model.pos_embed.shape[1] == 1 + cells
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
        and type(mlp) is Mlp
        and isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity)
        and getattr(attn, "gate", None) is None
        and isinstance(mlp.norm, nn.Identity)
        and isinstance(mlp.fc1, nn.Linear)
        and not any(part.p for part in block.modules() if isinstance(part, nn.Dropout))
    )
