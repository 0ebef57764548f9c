"""DINOv3's vision transformer: rotary position embedding (RoPE) instead of learned positions."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from timm.layers.attention import AttentionRope
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from dino_lite.backbones.blocks import DropPathBy, DropRate
from dino_lite.backbones.layers import Rotation, UnbiasedKeys
from dino_lite.backbones.timm_models import create_model
from dino_lite.backbones.transformer import Transformer, is_plain, mlp_of, timm_vit
from dino_lite.contracts import Traits, UserError
from dino_lite.settings.kinds import KeywordsOf, Must, NonNegative, Positive, Size
from dino_lite.settings.validate import checked

# Factors between 1/value and value.
Factor = Annotated[float, Must("a number of at least 1", lambda factor: factor >= 1)]

# What a patch's row and column are divided by: rows and columns, or for both the larger or smaller.
Normalizer = Literal["separate", "max", "min"]

# Shared by all DINOv3 ViTs; the qkv biases are missing in the 7B model and zero in most others.
_DINOV3: dict[str, Any] = {
    "num_registers": 4,
    "init_values": 1e-5,
    "norm_eps": 1e-5,
    "qkv_bias": False,
    "rope_base": 100.0,
    "rope_normalize_coords": "separate",
    "key_bias": False,
}


class RoPEViT(Transformer):
    """DINOv3's ViT (Siméoni et al. 2025, section 3.2) with its own forward pass: mask → class token
    and registers → blocks with rotated queries and keys of patches → norm.

    `name` is a timm name, or "rope" with `embed_dim`, `depth` and `num_heads`; `mlp`, `mlp_ratio`,
    `num_registers`, `init_values`, `norm_eps`, `qkv_bias` and `rope_base` default to the named
    model's or to DINOv3's. Parameter names are those of `ViT`; of the biases of `qkv_bias`, keys
    have one only with `key_bias`, unlike DINOv3's. Image sides may be any multiple of the patch
    size; `rope_normalize_coords` is how coordinates of oblong images are scaled. Stochastic depth
    is as in `ViT`. In training, the student's coordinates are augmented. For both see
    `RotaryPositions`.
    """

    kind = "rope"

    @checked
    def __init__(
        self,
        name: str = "rope",
        patch_size: Size = 16,
        in_chans: Size = 3,
        drop_path: DropRate = 0.0,
        drop_path_by: DropPathBy = "sample",
        drop_path_uniform: bool = False,
        rope_shift: NonNegative = 0.0,
        rope_jitter: Factor = 1.0,
        rope_rescale: Factor = 1.0,
        mask_token: bool = False,
        rope_base: Positive | None = None,
        rope_normalize_coords: Normalizer | None = None,
        key_bias: bool | None = None,
        **architecture: Annotated[Any, KeywordsOf(timm_vit)],
    ) -> None:
        asked = architecture | {
            "rope_base": rope_base,
            "rope_normalize_coords": rope_normalize_coords,
            "key_bias": key_bias,
        }
        given = {key: value for key, value in asked.items() if value is not None}
        sizes: dict[str, Any] = {"patch_size": patch_size, "in_chans": in_chans}
        made_of = _DINOV3 | ({} if name == "rope" else sizes_of(name)) | given
        base, normalizer = made_of.pop("rope_base"), made_of.pop("rope_normalize_coords")
        qkv_bias, key_bias = made_of.pop("qkv_bias"), made_of.pop("key_bias")
        without: dict[str, Any] = {"img_size": patch_size, "pos_embed": "none"}
        without["qkv_bias"] = bool(qkv_bias and key_bias)
        model = timm_vit("vit", **sizes, **without, drop_path_rate=drop_path, **made_of)
        if not is_plain(model):
            raise UserError(
                f"backbone.name={name} with {', '.join(sorted(given))} is not a DINOv3 ViT: change "
                "only its sizes."
            )
        spec = {"name": name, **sizes, **given}
        uniform = drop_path if drop_path_uniform else None
        super().__init__(model, spec, mask_token, drop_path_by, uniform)
        for token in (self.cls_token, self.register_tokens):  # timm's std is 1e-6
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if qkv_bias and not key_bias:
            for block in self.blocks:
                block.attn.qkv = UnbiasedKeys(block.attn.qkv)
        width = self.embed_dim // self.blocks[0].attn.num_heads
        moves = (rope_shift, rope_jitter, rope_rescale)
        self.positions = RotaryPositions(width, base, *moves, normalizer)

    @classmethod
    def traits(cls, name: str = "rope", **settings: Any) -> Traits:
        """`small` if given by sizes."""
        return Traits(small=name == "rope", names=("rope", "vit_small_patch16_dinov3"))

    def disable_noise(self) -> None:
        """Switch off the augmentation of coordinates."""
        self.positions.moves = False

    def embed(
        self, images: Float[Tensor, "n C H W"], mask: Bool[Tensor, "n P"] | None = None
    ) -> tuple[Float[Tensor, "n N D"], tuple[int, int]]:
        """Tokens before the first block, and their grid."""
        patches, grid = self.patches(images, mask)
        first = [t for t in (self.cls_token, self.register_tokens) if t is not None]
        num = images.shape[0]  # len() is a constant in a trace
        return torch.cat([*(t.expand(num, -1, -1) for t in first), patches], dim=1), grid

    def rotation(self, grid: tuple[int, int]) -> Rotation:
        """The rotation of patches' queries and keys, the same in every block of a pass."""
        rotation: Rotation = self.positions(grid, self.cls_token)
        return rotation

    def fix_size(self, height: int, width: int) -> None:
        """Store the rotation for images of this size."""
        grid = (height // self.patch_size, width // self.patch_size)
        self.positions.fixed = self.rotation(grid)


class RotaryPositions(nn.Module):
    """Patch positions as angles 2π·coordinate/period; row and column coordinates are in [−1, 1] for
    every grid, periods are geometrically spaced from 1 to just below `base`. With `normalizer`
    "max" or "min", both are divided by the larger or the smaller side of the grid: an oblong grid
    then begins at −1 too, but ends below or above 1.

    In training mode, coordinates are augmented once per pass with draws of the global generator:
    rows and columns are each shifted by up to ±`shift` and scaled by a factor between 1/`jitter`
    and `jitter`, then both by one factor between 1/`rescale` and `rescale` (DINOv3, "RoPE-box
    jittering": rescale 2). 0, 1 and 1 switch this off, as does `moves=False` (teachers).
    """

    @checked
    def __init__(
        self,
        width: int,
        base: Positive,
        shift: NonNegative = 0.0,
        jitter: Factor = 1.0,
        rescale: Factor = 1.0,
        normalizer: Normalizer = "separate",
    ) -> None:
        super().__init__()
        if width % 4:
            raise UserError(
                f"backbone.num_heads: the width of a head is {width}, but RoPE needs a multiple of "
                "4: choose another number of heads."
            )
        self.width, self.base, self.normalizer = width, base, normalizer
        self.shift, self.jitter, self.rescale = shift, jitter, rescale
        self.moves = True
        self.fixed: Rotation | None = None  # returned for every grid, without augmentation

    @property
    def is_noisy(self) -> bool:
        """Whether coordinates are augmented in training mode."""
        return self.moves and (self.shift > 0 or self.jitter > 1 or self.rescale > 1)

    def forward(self, grid: tuple[int, int], like: Tensor) -> Rotation:
        """Sines and cosines for the patches of a grid in row-major order, on the device and in the
        precision of `like`, at least float32 even under autocast.
        """
        if self.fixed is not None:
            return self.fixed
        dtype = torch.promote_types(like.dtype, torch.float32)
        whole = {"max": (max(grid),) * 2, "min": (min(grid),) * 2}.get(self.normalizer, grid)
        axes = [
            torch.arange(0.5, size, dtype=dtype, device=like.device) / side
            for size, side in zip(grid, whole, strict=True)
        ]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1) * 2 - 1
        if self.training and self.is_noisy:
            offset, factor = self._draw().to(places, non_blocking=True)
            places = (places + offset) * factor
        exponents = torch.arange(self.width // 4, dtype=dtype, device=like.device)
        periods = self.base ** (exponents * 4 / self.width)
        angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).tile(2)  # P d
        return angles.sin(), angles.cos()

    def _draw(self) -> Float[Tensor, "2 2"]:
        """Offsets and factors of the two coordinates; drawn on the CPU, so that the draws do not
        depend on the device.
        """
        offset, factor = torch.zeros(2, dtype=torch.float32), torch.ones(2, dtype=torch.float32)
        if self.shift:
            offset.uniform_(-self.shift, self.shift)
        for most, num in ((self.jitter, 2), (self.rescale, 1)):
            if most > 1:
                logs = torch.empty(num, dtype=torch.float32)
                factor = factor * logs.uniform_(-math.log(most), math.log(most)).exp()
        return torch.stack([offset, factor])


def sizes_of(name: str) -> dict[str, Any]:
    """Keywords with which name="rope" has the architecture of timm's DINOv3 ViT `name`. The timm
    model is built on the meta device.
    """
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model: Any = create_model(name, num_classes=0)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"backbone.name={name} cannot be built: {error}.") from error
    if not is_dinov3(model):
        raise UserError(
            f"backbone.name={name} is not a DINOv3 ViT: choose the timm name of one "
            '(vit_small_patch16_dinov3), or name="rope" with its sizes.'
        )
    block = model.blocks[0]
    gated, key_bias = not isinstance(block.mlp, Mlp), block.attn.qkv.bias is not None
    return {
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "num_registers": model.num_prefix_tokens - 1,
        "init_values": 0.0 if block.gamma_1 is None else _DINOV3["init_values"],
        "norm_eps": model.norm.eps,
        "qkv_bias": key_bias or getattr(block.attn, "q_bias", None) is not None,
        "key_bias": key_bias,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "rope_base": model.rope.temperature,
        **mlp_of(model.embed_dim, block.mlp.fc2.in_features, gated),
    }


def is_dinov3(model: Any) -> bool:
    """Whether RoPEViT's forward pass is equivalent to that of the timm model."""
    rope: Any = getattr(model, "rope", None)
    return (
        isinstance(model, Eva)
        and isinstance(rope, RotaryEmbeddingDinoV3)
        and (rope.rotate_half, rope.normalize_coords) == (True, "separate")
        and (rope.grid_offset, rope.grid_indexing, rope.min_period) == (0, "ij", None)
        and model.cls_token is not None
        and model.pos_embed is None
        and isinstance(model.norm_pre, nn.Identity)
        and isinstance(model.norm, nn.LayerNorm)
        and all(_is_dinov3_block(block) for block in model.blocks)
    )


def _is_dinov3_block(block: Any) -> bool:
    attn: Any = getattr(block, "attn", None)
    mlp: Any = getattr(block, "mlp", None)
    return (
        type(block) is EvaBlock
        and type(attn) in (EvaAttention, AttentionRope)
        and attn.qkv is not None
        and getattr(attn, "gate", None) is None
        and isinstance(attn.norm, nn.Identity)
        and (block.gamma_1 is None) == (block.gamma_2 is None)
        and type(mlp) in (Mlp, GluMlp, SwiGLU)
        and isinstance(mlp.norm, nn.Identity)
    )
