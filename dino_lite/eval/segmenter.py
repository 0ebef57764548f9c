"""A linear segmentation head on frozen patch tokens.

Oquab et al. 2024 (DINOv2), section 7.4: batch normalization and a 1x1 convolution, whose logits are
upsampled bilinearly. Upsampling and a linear map commute: a pixel's logits are those of its
features interpolated between the four patches around it. So the head is trained on pixels, not on
whole maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dino_lite.contracts import Backbone
from dino_lite.data.photometric import Normalize
from dino_lite.data.pixel_labels import MaskedImages, fitted
from dino_lite.eval.features import device_of, dtype_of, frozen
from dino_lite.meter import metered


class Pixels(NamedTuple):
    """Sampled pixels: features, class (as an index into a list of classes), and image."""

    features: Float[Tensor, "n D"]
    classes: Int[Tensor, "n"]
    image: Int[Tensor, "n"]

    def rows(self, chosen: Tensor) -> Pixels:
        """The pixels at `chosen`, indices or a mask."""
        return Pixels(*(part[chosen] for part in self))


class Segmenter(NamedTuple):
    """A linear head with normalization folded in."""

    weight: Float[Tensor, "D C"]
    bias: Float[Tensor, "C"]

    def logits(self, features: Float[Tensor, "*n D"]) -> Float[Tensor, "*n C"]:
        """Logits of pixels or patches."""
        return features @ self.weight + self.bias

    def predict(
        self, features: Float[Tensor, "h w D"], size: tuple[int, int]
    ) -> Int[Tensor, "H W"]:
        """The class of each pixel of a mask of `size`, from patch features."""
        logits = self.logits(features).permute(2, 0, 1)[None]  # 1 C h w
        return F.interpolate(logits, size=size, mode="bilinear")[0].argmax(dim=0)


def patch_features(
    backbone: Backbone,
    image: UInt8[np.ndarray, "H W C"],
    normalize: Normalize,
    shorter: int | None = None,
) -> Float[Tensor, "h w D"]:
    """The last block's patch tokens of a whole image, resized by `fitted`; float32, on the device.
    The backbone must be `frozen`.
    """
    pixels = np.ascontiguousarray(fitted(image, backbone.patch_size, shorter).transpose(2, 0, 1))
    images = torch.tensor(pixels[None], device=device_of(backbone))
    tokens = backbone(normalize(images, dtype_of(backbone)))
    return tokens.patches[0].float().reshape(*tokens.grid, -1)


def between_patches(
    features: Float[Tensor, "h w D"], pixels: Int[Tensor, "n 2"], size: tuple[int, int]
) -> Float[Tensor, "n D"]:
    """Features at `pixels` (row, column) of a mask of `size`, interpolated bilinearly between patch
    centers like `F.interpolate`.
    """
    lower, upper, part = [], [], []
    for axis in (0, 1):
        last = features.shape[axis] - 1
        place = (pixels[:, axis] + 0.5) * (features.shape[axis] / size[axis]) - 0.5
        place = place.clamp(0, last).to(features.device)
        below = place.long()
        lower.append(below)
        upper.append((below + 1).clamp(max=last))
        part.append((place - below).to(features.dtype)[:, None])
    above = torch.lerp(features[lower[0], lower[1]], features[lower[0], upper[1]], part[1])
    under = torch.lerp(features[upper[0], lower[1]], features[upper[0], upper[1]], part[1])
    return torch.lerp(above, under, part[0])


def draw_pixels(
    backbone: Backbone,
    images: MaskedImages,
    numbers: Sequence[int],
    normalize: Normalize,
    num_pixels: int,
    shorter: int | None = None,
    seed: int = 0,
) -> Pixels:
    """At most `num_pixels` labeled pixels, equally many per image, drawn by (seed, image index);
    `numbers` lists the classes.
    """
    found, each = [], max(1, num_pixels // len(images))
    with frozen(backbone):
        for i in metered(range(len(images)), len(images), "features of pixels", "images"):
            image, classes = images.read(i)
            known = np.flatnonzero(classes >= 0)
            generator = np.random.default_rng([seed, i])
            chosen = generator.choice(known, min(each, len(known)), replace=False)
            places = np.searchsorted(numbers, classes.ravel()[chosen])
            pixels = torch.from_numpy(np.stack(np.divmod(chosen, classes.shape[1]), axis=1))
            features = patch_features(backbone, image, normalize, shorter)
            features = between_patches(features, pixels, classes.shape).cpu()
            row = Pixels(features, torch.from_numpy(places), torch.full((len(chosen),), i))
            found.append(row)
    return Pixels(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def train_heads(
    pixels: Pixels,
    num_classes: int,
    rates: Sequence[float],
    num_steps: int,
    batch_size: int,
    weight_decay: float,
    device: torch.device,
    seed: int = 0,
) -> list[Segmenter]:
    """One head per rate, all on the same batches: cross-entropy, AdamW, cosine decay to 0.

    Features are normalized by mean and standard deviation of all pixels. Heads start at zero, so
    only the batches are random.
    """
    features, classes = pixels.features.to(device), pixels.classes.to(device)
    std, mean = torch.std_mean(features, dim=0, correction=0)
    scale = 1 / std.clamp(min=1e-5)
    width, num = features.shape[1], len(rates)
    weights = [torch.zeros(num_classes, width, device=device, requires_grad=True) for _ in rates]
    biases = [torch.zeros(num_classes, device=device, requires_grad=True) for _ in rates]
    groups: list[dict[str, Any]] = [
        {"params": head, "lr": rate} for *head, rate in zip(weights, biases, rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    title = f"training {num} head{'s' if num > 1 else ''}"
    for step in metered(range(num_steps), num_steps, title, "steps"):
        rows = torch.randint(len(classes), (batch_size,), generator=generator).to(device)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * step / num_steps)) / 2
        unit = (features[rows] - mean) * scale
        logits = F.linear(unit, torch.cat(weights), torch.cat(biases))
        logits = logits.reshape(-1, num, num_classes).transpose(1, 2)  # n C heads
        wanted = classes[rows, None].expand(-1, num)
        optimizer.zero_grad()
        cast(Any, F.cross_entropy(logits, wanted) * num).backward()
        optimizer.step()
    folded = [weight.detach().T * scale[:, None] for weight in weights]
    return [Segmenter(w, b.detach() - mean @ w) for w, b in zip(folded, biases, strict=True)]
