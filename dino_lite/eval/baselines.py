"""Baselines of an evaluation: raw pixels, and the same network with untrained weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dino_lite.backbones.compact import Compact
from dino_lite.contracts import Backbone, Tokens
from dino_lite.data.clean import CleanData
from dino_lite.data.photometric import Normalize
from dino_lite.eval.features import device_of, extract
from dino_lite.eval.knn import KNN
from dino_lite.eval.store import FeatureStore
from dino_lite.meter import named


class Baseline(NamedTuple):
    """A network to compare a backbone with; baselines of equal `key` have equal results."""

    title: str
    key: str
    build: Callable[[], Backbone]


class RawPixels(Backbone):
    """Pixels as tokens, without learning: the class token is the image at size x size pixels minus
    the mean image, a patch token is the pixels of its patch.

    `normalize` is the normalization of its input images, whose scale per channel is undone.
    """

    num_blocks = 1
    mean: Tensor
    scale: Tensor

    def __init__(self, normalize: Normalize, patch_size: int, size: int = 32) -> None:
        super().__init__()
        scale = normalize.std.float().cpu()
        self.in_chans, self.patch_size, self.size = len(scale), patch_size, size
        self.embed_dim = self.in_chans * size**2
        self.spec: dict[str, Any] = {"name": "raw_pixels", "patch_size": patch_size, "size": size}
        self.register_buffer("scale", scale.reshape(1, -1, 1, 1))
        self.register_buffer("mean", torch.zeros(self.embed_dim))

    def forward(
        self,
        images: Float[Tensor, "n C H W"],
        mask: Bool[Tensor, "n P"] | None = None,
        cls_only: bool = False,
    ) -> Tokens:
        """Pixels as tokens; `mask` is ignored."""
        images = images * self.scale
        size = (self.size, self.size)
        small = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        patch = self.patch_size
        patches = F.unfold(images, patch, stride=patch).transpose(1, 2)  # n P C*p*p
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        return Tokens(small.flatten(1) - self.mean, patches, None, grid)

    def intermediate(self, images: Float[Tensor, "n C H W"], blocks: list[int]) -> list[Tokens]:
        """The same tokens for each of `blocks`."""
        tokens = self(images)
        return [tokens for _ in blocks]

    def attention(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n heads N N"]:
        """Uniform weights 1/N, since there is no attention."""
        num = 1 + images.shape[2] * images.shape[3] // self.patch_size**2
        return images.new_full((len(images), 1, num, num), 1 / num)

    def depth_of(self, name: str) -> int:
        """Layer 0, the only one."""
        return 0


def raw_pixels(data: CleanData, patch_size: int = 8, size: int = 32) -> RawPixels:
    """Raw pixels, centered on the mean image of train."""
    pixels = RawPixels(data.normalize, patch_size, size)
    everything = extract(pixels, data, data.splits.train, torch.device("cpu"), "mean image")
    pixels.mean.copy_(everything.features.mean(dim=0))
    return pixels


def untrained(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same network with fresh weights drawn from `seed`, on the same device; of a compact one,
    the whole network.
    """
    if isinstance(backbone, Compact):
        return untrained(backbone.whole, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(backbone)(**backbone.spec)
    return fresh.to(device_of(backbone))


KNN_KEYS = {  # title of each network, and its keys in results.json
    "trained": "knn_trained",
    "untrained": "knn_untrained",
    "raw pixels": "knn_raw_pixels",
}


def knn_against_baselines(
    trained: Backbone,
    data: CleanData,
    seed: int = 0,
    titles: Container[str] = tuple(KNN_KEYS),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """k-NN at k = 20 of those of `titles`: the trained network, the untrained one and raw pixels
    (32x32, mean image subtracted).

    Each as soon as it is measured: its title, and entries for results.json: top-1 in percent
    (`knn_trained` …), its interval (`knn_trained_interval` …) and the protocol.
    """
    knn, store = KNN(ks=[20]), FeatureStore(data)
    build: dict[str, Callable[[], Backbone]] = {
        "trained": lambda: trained,
        "untrained": lambda: untrained(trained, seed),
        "raw pixels": lambda: raw_pixels(data),
    }
    for title, key in KNN_KEYS.items():
        if title in titles:
            with named(f"k-NN of {title}"):
                found = knn(build[title](), store)
            yield (
                title,
                {
                    key: round(found["value"], 2),
                    f"{key}_interval": [round(bound, 2) for bound in found["interval"]],
                    "knn_protocol": f"k={found['top1_k']}, {found['protocol']}",
                    "knn_num_test": found["num_test"],
                },
            )


def measured_by_knn(results: Mapping[str, Any]) -> list[str]:
    """Titles of the networks that `results` has with their intervals."""
    return [title for title, key in KNN_KEYS.items() if f"{key}_interval" in results]


def knn_result(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The k-NN accuracy in a run's results.json as the result of an evaluation with baselines; None
    if it was not measured.
    """
    if "knn_trained" not in results:
        return None
    entries = {
        title: {"value": results[key], "interval": results.get(f"{key}_interval")}
        for title, key in KNN_KEYS.items()
        if key in results
    }
    return {
        "metric": "k-NN top-1",
        "unit": "%",
        "protocol": results.get("knn_protocol", ""),
        "num_test": results.get("knn_num_test"),
        **entries.pop("trained"),
        "baselines": entries,
    }


def baseline_table(results: Mapping[str, Any]) -> str:
    """The results of `knn_against_baselines` as lines of text."""
    lines = [
        f"  {title:12s} {results[key]:6.2f} %  ({low:.2f} to {high:.2f})"
        for title, key in reversed(KNN_KEYS.items())
        for low, high in [results[f"{key}_interval"]]
    ]
    return "\n".join([f"k-NN top-1 ({results['knn_protocol']})", *lines])


def baselines_of(backbone: Backbone, data: CleanData, seed: int) -> list[Baseline]:
    """Raw pixels, and the same network with fresh weights drawn from `seed`."""
    size = [*data.preprocessing.size, *data.preprocessing.geometry]
    scale = [*data.preprocessing.mean, *data.preprocessing.std]
    device = device_of(backbone)
    return [
        Baseline(
            "raw pixels",
            json.dumps([size, backbone.patch_size, backbone.in_chans]),
            lambda: raw_pixels(data, backbone.patch_size).to(device),
        ),
        Baseline(
            "untrained",
            json.dumps([backbone.stored_spec(), size, scale]),
            lambda: untrained(backbone, seed),
        ),
    ]
