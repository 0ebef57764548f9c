"""Base class of the vision transformers, and how they are built from timm's layers."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.mlp import GluMlp, Mlp
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dino_lite.backbones.blocks import Block, DropPathBy, run_blocks
from dino_lite.backbones.layers import Rotation
from dino_lite.backbones.timm_models import create_model
from dino_lite.contracts import Backbone, Memory, Tokens, UserError
from dino_lite.settings.kinds import Count, KeywordsOf, NonNegative, Positive, Size
from dino_lite.settings.validate import checked


class Transformer(Backbone):
    """Patches, class token and registers → blocks → last norm. Abstract: subclasses define position
    encoding (`embed`, `rotation`).

    Takes the layers of the timm model `model`. With `mask_token`, a learned token (initialized to
    zero) replaces masked patches. Stochastic depth is the model's, or `drop_path_uniform` in every
    block.
    """

    def __init__(
        self,
        model: Any,
        spec: dict[str, Any],
        mask_token: bool,
        drop_path_by: DropPathBy = "sample",
        drop_path_uniform: float | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec | {"num_registers": model.num_reg_tokens, "mask_token": mask_token}
        self.embed_dim = model.embed_dim
        self.patch_size, self.in_chans = spec["patch_size"], spec["in_chans"]
        self.patch_embed = model.patch_embed
        self.patch_embed.strict_img_size, self.patch_embed.flatten = False, True
        self.blocks: Any = nn.Sequential(*(Block(block) for block in model.blocks))
        self.norm = model.norm
        self.num_blocks = len(self.blocks)
        self.cls_token: nn.Parameter = model.cls_token
        self.register_tokens: nn.Parameter | None = model.reg_token
        self.num_registers: int = model.num_reg_tokens
        nothing = torch.zeros(1, self.embed_dim)
        self.mask_token: nn.Parameter | None = nn.Parameter(nothing) if mask_token else None
        self.takes_masks = mask_token
        self.drop_path_by: DropPathBy = drop_path_by
        if drop_path_uniform is not None:
            for block in self.blocks:
                block.drop_path1 = block.drop_path2 = DropPath(drop_path_uniform)
        self.memory: Memory = "normal"  # see run_blocks
        self.compiled = False

    def set_memory(self, memory: Memory, compiled: bool) -> None:
        """Set which activations blocks save (see `run_blocks`), and whether blocks are compiled."""
        self.memory, self.compiled = memory, compiled

    def forward(
        self,
        images: Float[Tensor, "n C H W"],
        mask: Bool[Tensor, "n P"] | None = None,
        cls_only: bool = False,
    ) -> Tokens:
        """Tokens after the last norm. Patches in `mask` are replaced by the mask token before
        positions are added (masked image modeling). With `cls_only` the last block computes only
        the class token: patches and registers are empty.
        """
        tokens, grid = self.embed(images, mask)
        rotation = self.rotation(grid)
        tokens = self._run(tokens, rotation, last_queries=1 if cls_only else None)
        return self._tokens(tokens, grid)

    def embed(
        self, images: Float[Tensor, "n C H W"], mask: Bool[Tensor, "n P"] | None = None
    ) -> tuple[Float[Tensor, "n N D"], tuple[int, int]]:
        """Tokens before the first block, and their grid."""
        raise NotImplementedError

    def rotation(self, grid: tuple[int, int]) -> Rotation | None:
        """Rotation of patches' queries and keys in every block of one pass; None: no rotation."""
        return None

    def patches(
        self, images: Float[Tensor, "n C H W"], mask: Bool[Tensor, "n P"] | None
    ) -> tuple[Float[Tensor, "n P D"], tuple[int, int]]:
        """Patch embeddings without positions, the mask token replacing those in `mask`, and their
        grid. Raises UserError if the patch size does not divide the image size.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"images of {height}x{width} pixels do not divide into patches of "
                f"{self.patch_size}: choose crop sizes that are multiples of backbone.patch_size."
            )
        grid = (height // self.patch_size, width // self.patch_size)
        patches = self.patch_embed(images)
        if mask is not None:
            if self.mask_token is None:
                raise NotImplementedError("this backbone has no mask token: set mask_token=true")
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        return patches, grid

    def intermediate(self, images: Float[Tensor, "n C H W"], blocks: list[int]) -> list[Tokens]:
        """Tokens after each of `blocks` and the last norm, in the given order; negative numbers
        count from the last block.
        """
        wanted = [range(len(self.blocks))[i] for i in blocks]
        tokens, grid = self.embed(images)
        rotation = self.rotation(grid)
        found: dict[int, Tokens] = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            tokens = self._run(tokens, rotation, [block])
            if i in wanted:
                found[i] = self._tokens(tokens, grid)
        return [found[i] for i in wanted]

    def attention(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n heads N N"]:
        """Softmax attention of the last block; rows sum to one. Tokens in order: class token,
        registers, patches.
        """
        tokens, grid = self.embed(images)
        rotation = self.rotation(grid)
        tokens = self._run(tokens, rotation, self.blocks[:-1])
        last: Block = self.blocks[-1]
        return last.attn.weights(last.norm1(tokens), rotation)

    def depth_of(self, name: str) -> int:
        """Layer of the parameter `name`: 0 stem, i+1 block i, depth+1 the last norm."""
        first, *rest = name.split(".")
        if first == "blocks":
            return int(rest[0]) + 1
        return len(self.blocks) + 1 if first == "norm" else 0

    def _run(
        self,
        tokens: Tensor,
        rotation: Rotation | None,
        blocks: Any = None,
        last_queries: int | None = None,
    ) -> Tensor:
        blocks = list(self.blocks if blocks is None else blocks)
        settings = (last_queries, self.memory, self.compiled, self.drop_path_by, rotation)
        return run_blocks(blocks, tokens, *settings)

    def _tokens(self, tokens: Float[Tensor, "n N D"], grid: tuple[int, int]) -> Tokens:
        tokens, first = self.norm(tokens), 1 + self.num_registers
        registers = tokens[:, 1:first] if self.num_registers else None
        return Tokens(tokens[:, 0], tokens[:, first:], registers, grid)


@checked
def timm_vit(
    name: str,
    num_registers: Count | None = None,
    mlp: Literal["gelu", "swiglu"] | None = None,
    norm_eps: Positive | None = None,
    embed_dim: Size | None = None,
    depth: Size | None = None,
    num_heads: Size | None = None,
    init_values: NonNegative | None = None,
    **architecture: Annotated[Any, KeywordsOf(VisionTransformer)],
) -> Any:
    """The timm model, without classifier, that provides the layers. `name` is a timm name, or "vit"
    with sizes. Raises UserError if timm cannot build it.
    """
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    given = {k: v for k, v in (sizes | {"init_values": init_values}).items() if v is not None}
    kwargs: dict[str, Any] = {"num_classes": 0, **architecture, **given}
    if torch.get_default_device().type == "meta":  # where drawing takes most of the time
        kwargs["weight_init"] = "skip"
    if num_registers is not None:
        kwargs["reg_tokens"] = num_registers
    if num_registers:
        kwargs["no_embed_class"] = True
    if mlp == "swiglu":
        kwargs["mlp_layer"] = _swiglu
    if norm_eps is not None:
        kwargs["norm_layer"] = functools.partial(nn.LayerNorm, eps=norm_eps)
    try:
        model: Any = VisionTransformer(**kwargs) if name == "vit" else create_model(name, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"backbone.name={name} cannot be built: {reason}.") from error
    for part in model.modules():
        if isinstance(part, GluMlp):  # timm initializes the gate's half near zero, DINOv2 does not
            nn.init.trunc_normal_(part.fc1.weight, std=0.02)
            if part.fc1.bias is not None:
                nn.init.zeros_(part.fc1.bias)
    return model


def _swiglu(in_features: int, hidden_features: int, **settings: Any) -> GluMlp:
    """DINOv2's gated MLP: two thirds of a plain MLP's width, for an equal number of weights,
    rounded up to a multiple of 8.
    """
    width = (int(hidden_features * 2 / 3) + 7) // 8 * 8
    settings = settings | {"act_layer": nn.SiLU, "gate_last": False}
    return GluMlp(in_features, 2 * width, **settings)


def is_plain(model: Any) -> bool:
    """Whether `Transformer`'s forward pass is equivalent to the timm model's, except for positions:
    class token, registers, blocks, last norm.
    """
    return (
        isinstance(model, VisionTransformer)
        and model.cls_token is not None
        and model.num_prefix_tokens == 1 + model.num_reg_tokens
        and len(model.blocks) > 0
        and all(_is_plain_block(block) for block in model.blocks)
        and isinstance(model.norm_pre, nn.Identity)
        and not isinstance(model.norm, nn.Identity)
        and isinstance(model.patch_drop, nn.Identity)
        and not getattr(model.pos_drop, "p", 0.0)
    )


def _is_plain_block(block: Any) -> bool:
    """Whether `blocks.Block` is equivalent to the timm block."""
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    return (
        type(block) is TimmBlock
        and type(attn) is Attention
        and (type(mlp) is Mlp or (type(mlp) is GluMlp and not mlp.gate_last))
        and isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity)
        and getattr(attn, "gate", None) is None
        and isinstance(mlp.norm, nn.Identity)
        and isinstance(mlp.fc1, nn.Linear)
        and not any(part.p for part in block.modules() if isinstance(part, nn.Dropout))
    )


def mlp_of(width: int, hidden: int, gated: bool) -> dict[str, Any]:
    """`timm_vit`'s keywords for an MLP whose second layer has `hidden` inputs."""
    if gated:
        hidden = -(-hidden * 3 // 2)  # `_swiglu` takes two thirds of it, a multiple of 8
    ratio = hidden / width
    if int(width * ratio) != hidden:  # as timm rounds
        ratio = (hidden + 0.5) / width
    return {"mlp": "swiglu" if gated else "gelu", "mlp_ratio": ratio}
