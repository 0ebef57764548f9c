"""Convolutional networks: timm's ResNets and ConvNeXts, and a small ResNet for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers.drop import DropPath
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet, downsample_conv
from torch import Tensor, nn

from dino_lite.backbones.blocks import DropRate
from dino_lite.backbones.timm_models import create_model
from dino_lite.contracts import Backbone, Tokens, Traits, UserError
from dino_lite.settings.kinds import Count, Positive, Size
from dino_lite.settings.validate import checked

_GROUP = 16  # channels per group of group normalization
_NUM_STAGES = 4  # of timm's ResNets and ConvNeXts


class ConvNet(Backbone):
    """Stem → stages → last norm. Patch tokens are the cells of the last feature map, the class
    token is their mean. With `fields`, the class token is a pyramid instead (cf. Lin et al. 2017),
    which preserves spatial layout: the last map pooled to fields x fields, the map of the stage
    before to twice that per side, and so on, concatenated.

    `name` is "resnet" with the `widths` and `depths` of its stages: a network for small images,
    without 7x7 convolution or max-pooling (He et al. 2016, section 4.2). Or it is a timm ResNet or
    ConvNeXt, whose widths and depths these replace if they are four. `patch_size` is the total
    stride. `norm` is "batch" (statistics of the micro-batch, so that the micro-batch size affects
    training), "group" (Wu & He 2018; per image), or "layer", which every ConvNeXt has; `norm_eps`
    replaces the epsilon of its norms, and `last_norm_eps` that of the last one. In
    `intermediate`, blocks are stages.
    """

    kind = "convnet"
    whole_patches = False

    @checked
    def __init__(
        self,
        name: str = "resnet",
        patch_size: Size = 32,
        in_chans: Size = 3,
        drop_path: DropRate = 0.0,
        norm: Literal["batch", "group", "layer"] = "batch",
        widths: Sequence[Size] | None = None,
        depths: Sequence[Size] | None = None,
        fields: Count = 0,
        norm_eps: Positive | None = None,
        last_norm_eps: Positive | None = None,
    ) -> None:
        super().__init__()
        if (norm_eps or last_norm_eps) and norm != "layer":
            raise UserError(
                "backbone.norm_eps and backbone.last_norm_eps are of layer normalization, which "
                "only a ConvNeXt has: set them to null."
            )
        self.spec: dict[str, Any] = {
            "name": name,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "norm": norm,
            "fields": fields,
        }
        if name == "resnet":
            self.spec |= {"widths": list(widths or ()), "depths": list(depths or ())}
            parts = _small(self.spec, drop_path)
        else:
            for key, values in (("widths", widths), ("depths", depths)):
                if values and len(values) == _NUM_STAGES:
                    self.spec[key] = list(values)
            if norm_eps:
                self.spec["norm_eps"] = norm_eps
            if last_norm_eps:
                self.spec["last_norm_eps"] = last_norm_eps
            parts = _named(self.spec, drop_path)
        self.stem, self.stages, self.norm = parts.stem, nn.ModuleList(parts.stages), parts.norm
        self.patch_size, self.in_chans, self.fields = patch_size, in_chans, fields
        self.any_size = not fields  # where a cell of a field begins is rounded, by image size
        self.width = self.embed_dim = parts.widths[-1]
        if fields:
            sides = self._sides(len(parts.widths))
            each = zip(parts.widths, sides, strict=True)
            self.embed_dim = sum(width * side**2 for width, side in each)
        self.num_blocks = len(self.stages)
        self.to(memory_format=torch.channels_last)  # faster

    @classmethod
    def traits(cls, name: str = "resnet", norm: str = "batch", **settings: Any) -> Traits:
        """`small` if given by widths; only a ConvNeXt has stochastic depth by default."""
        return Traits(
            convolutional=True,
            small=name == "resnet",
            drop_path=not name.startswith("resnet"),
            mixes_images=norm == "batch",
        )

    def forward(
        self,
        images: Float[Tensor, "n C H W"],
        mask: Bool[Tensor, "n P"] | None = None,
        cls_only: bool = False,
    ) -> Tokens:
        """Tokens after the last norm; with `cls_only` no patches. Masks are not supported."""
        if mask is not None:
            raise NotImplementedError("a convolutional network has no mask token: use a ViT")
        return self._tokens(self._maps(images), cls_only)

    def intermediate(self, images: Float[Tensor, "n C H W"], blocks: list[int]) -> list[Tokens]:
        """Tokens after each of the stages `blocks`; negative numbers count from the last. Only the
        last stage is followed by the last norm.

        Narrower stages are padded with zeros to the full width, which leaves inner products and
        cosines unchanged.
        """
        maps = self._maps(images)
        stages = [range(len(maps))[i] for i in blocks]
        return [self._tokens(maps[: i + 1]) for i in stages]

    def attention(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n heads N N"]:
        """Raises UserError: convolutional networks have no attention."""
        raise UserError("a convolutional network has no attention: choose a vision transformer.")

    def depth_of(self, name: str) -> int:
        """Layer of the parameter `name`: 0 stem, i+1 stage i, depth+1 the last norm."""
        first, *rest = name.split(".")
        if first == "stages":
            return int(rest[0]) + 1
        return 0 if first == "stem" else len(self.stages) + 1

    def _maps(self, images: Float[Tensor, "n C H W"]) -> list[Float[Tensor, "n _ _ _"]]:
        """Feature maps after each stage."""
        x, maps = self.stem(images.contiguous(memory_format=torch.channels_last)), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def _tokens(self, maps: list[Float[Tensor, "n _ _ _"]], cls_only: bool = False) -> Tokens:
        cells = maps[-1]
        norm = self.norm if len(maps) == len(self.stages) else nn.Identity()
        if self.fields:
            sides = zip(maps, self._sides(len(maps)), strict=True)
            parts = [F.adaptive_avg_pool2d(each, side) for each, side in sides]
            parts[-1] = norm(parts[-1])
            cls = torch.cat([part.flatten(1) for part in parts], dim=1)
        else:
            cls = norm(cells.mean(dim=(2, 3), keepdim=True)).flatten(1)
        patches = cells[:, :, :0, :0] if cls_only else norm(cells)
        rows = patches.flatten(2).transpose(1, 2)  # n P D
        return Tokens(
            F.pad(cls, (0, self.embed_dim - cls.shape[1])),
            F.pad(rows, (0, self.width - rows.shape[2])),
            None,
            (cells.shape[2], cells.shape[3]),
        )

    def _sides(self, num: int) -> list[int]:
        """Pooled size per side of each of the first `num` stages; the last has `fields`."""
        return [self.fields * 2**i for i in reversed(range(num))]


class Parts(NamedTuple):
    """The parts from which a ConvNet is assembled."""

    stem: nn.Sequential
    stages: list[nn.Module]
    norm: nn.Module
    widths: list[int]  # of stages


def group_norm(channels: int, **settings: Any) -> nn.Module:
    """Group normalization with 16 channels per group."""
    return nn.GroupNorm(max(1, channels // _GROUP), channels, **settings)


_NORMS: dict[str, Callable[..., nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": group_norm,
}


def _norm(name: str) -> Callable[..., nn.Module]:
    if name not in _NORMS:
        raise UserError(f"backbone.norm={name}: choose one of {', '.join(_NORMS)}.")
    return _NORMS[name]


def _small(spec: dict[str, Any], drop_path: float) -> Parts:
    """A ResNet of basic blocks. Each stage but the first has stride 2, the stem has the rest of the
    total stride.
    """
    widths, depths, patch = spec["widths"], spec["depths"], spec["patch_size"]
    stride, rest = divmod(patch, 2 ** max(0, len(widths) - 1))
    if not widths or len(widths) != len(depths) or rest or not stride or min(depths) < 1:
        raise UserError(
            f"backbone: widths={widths} and depths={depths} must have one number per stage, and "
            f"patch_size={patch} must be a multiple of {2 ** max(0, len(widths) - 1)}."
        )
    norm: Any = _norm(spec["norm"])  # timm's annotation is a class, but a function works
    kernel = max(3, 2 * stride - 1)
    conv = nn.Conv2d(spec["in_chans"], widths[0], kernel, stride, kernel // 2, bias=False)
    stem = nn.Sequential(conv, norm(widths[0]), nn.ReLU(inplace=True))
    probs = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
    stages: list[nn.Module] = []
    before = widths[0]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        blocks: list[nn.Module] = []
        for _ in range(depth):
            step = 2 if i and not blocks else 1
            changes = step > 1 or width != before
            down = downsample_conv(before, width, 1, step, norm_layer=norm) if changes else None
            drop = DropPath(prob) if (prob := probs.pop(0)) else None
            blocks.append(BasicBlock(before, width, step, down, norm_layer=norm, drop_path=drop))
            before = width
        stages.append(nn.Sequential(*blocks))
    for part in nn.Sequential(stem, *stages).modules():
        if isinstance(part, nn.Conv2d):  # He et al. 2015, as in timm's ResNet
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return Parts(stem, stages, nn.Identity(), widths)


def _named(spec: dict[str, Any], drop_path: float) -> Parts:
    """A timm model's parts, without its classifier."""
    name, norm = spec["name"], spec["norm"]
    settings: dict[str, Any] = {"in_chans": spec["in_chans"], "drop_path_rate": drop_path}
    settings |= {"num_classes": 0, "output_stride": spec["patch_size"]}
    if norm != "layer":
        settings["norm_layer"] = _norm(norm)
    try:
        model: Any = create_model(name, **settings | _sizes(spec))
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        reason = error if str(error) else "patch_size, the total stride, must be 8, 16 or 32"
        raise UserError(f"backbone.name={name} cannot be built: {reason}.") from error
    if isinstance(model, ConvNeXt) is not (norm == "layer"):
        raise UserError(
            f"backbone.norm={norm}: choose layer for a ConvNeXt, batch or group for a ResNet."
        )
    if isinstance(model, ResNet):
        stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
        return Parts(stem, _layers(model), nn.Identity(), _widths(model))
    if isinstance(model, ConvNeXt) and isinstance(model.norm_pre, nn.Identity):
        last: Any = model.head.norm
        last.eps = spec.get("last_norm_eps", last.eps)
        return Parts(model.stem, list(model.stages), last, _widths(model))
    raise UserError(
        f"backbone.name={name} is not a timm ResNet or ConvNeXt: choose one of those (resnet50, "
        'convnext_tiny), or name="resnet" with widths and depths.'
    )


def _sizes(spec: dict[str, Any]) -> dict[str, Any]:
    """timm's keywords for the widths, depths and epsilon in `spec`."""
    widths, depths, eps = (spec.get(key) for key in ("widths", "depths", "norm_eps"))
    if spec["norm"] == "layer":
        sizes = {"dims": widths, "depths": depths, "norm_eps": eps}
    else:
        sizes = {"channels": widths and _channels(spec), "layers": depths}
    return {key: value for key, value in sizes.items() if value}


def _channels(spec: dict[str, Any]) -> list[int]:
    """Channels inside the blocks of a timm ResNet whose stages have the widths in `spec`."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model: Any = create_model(spec["name"])
    factors = [stage[0].expansion for stage in _layers(model)]
    if any(width % factor for width, factor in zip(spec["widths"], factors, strict=True)):
        raise UserError(
            f"backbone.widths={spec['widths']} must be multiples of {factors}, the factors by "
            f"which the blocks of name={spec['name']} expand their channels."
        )
    return [width // factor for width, factor in zip(spec["widths"], factors, strict=True)]


def _layers(model: Any) -> list[Any]:
    """The stages of a timm ResNet."""
    return [model.layer1, model.layer2, model.layer3, model.layer4]


def _widths(model: Any) -> list[int]:
    """Channels of the four stages of a timm model."""
    return [int(stage["num_chs"]) for stage in model.feature_info][-_NUM_STAGES:]
