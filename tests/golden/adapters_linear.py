"""Golden case of the linear probe: features, the grid of heads, and a short run of two of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_lite.backbones.vit import ViT
from dino_lite.eval.features import Pooled
from dino_lite.eval.linear import RATES
from dino_lite.eval.probes import Head, LinearHeads, cosine, make_grid
from golden.check import Check, below, bound, compare

Case = dict[str, Any]
_PRECISIONS = ((torch.float64, "f64", "64"), (torch.float32, "f32", ""))


def d24(case: Case, tensors: dict[str, Tensor], folder: Path) -> Iterator[Check]:
    """All three parts."""
    yield from d24_grid(case)
    yield from d24_run(case, tensors)
    yield from d24_features(case, tensors)


def d24_grid(case: Case) -> Iterator[Check]:
    """Every head of the grid in its place, its rate scaled, and how much of a row it reads."""
    hyper, width = case["hyper"], case["hyper"]["vit"]["embed_dim"]
    wanted_rates = torch.tensor(case["data"]["default_learning_rates"])
    yield compare("rates", torch.tensor(RATES), wanted_rates, bound("rtol 1e-12"))
    for name, rows in case["data"]["grids"].items():
        batch_size = int(name.removeprefix("batch"))
        grid = make_grid(hyper["n_last_blocks"], hyper["avgpool"], RATES, batch_size)
        most = max(hyper["n_last_blocks"])
        found, wanted = [], []
        for head in grid:
            read = head.columns(most, width, width)
            found.append([head.num_blocks, head.patches, head.base_rate, head.rate])
            found[-1].append(read.stop - read.start)
        for row in rows:
            keys = ("n_last_blocks", "avgpool", "base_lr", "lr", "in_dim")
            wanted.append([float(row[key]) for key in keys])
        limit = bound("rtol 1e-12")
        yield compare(name, *(torch.tensor(x, dtype=torch.float64) for x in (found, wanted)), limit)


def d24_run(case: Case, tensors: dict[str, Tensor]) -> Iterator[Check]:
    """Losses, rates, and the heads after the last step."""
    own, hyper = below(tensors, "sgd/"), case["hyper"]["sgd"]
    for dtype, precision, suffix in _PRECISIONS:
        limit = bound(case["tolerance"][precision], "losses")
        final = limit if dtype == torch.float64 else bound(case["tolerance"]["f32"], "features")
        cls, patches = own["in.cls_tokens"].to(dtype), own["in.patch_mean"].to(dtype)
        names = list(hyper["lr"])
        grid = [
            Head(int(name[1 : name.index("_")]), name.endswith("1"), rate, rate)
            for name, rate in hyper["lr"].items()
        ]
        like = Pooled(cls[0], patches[0], own["in.labels"][0], own["in.labels"][0])
        heads = LinearHeads(grid, like, hyper["num_classes"], torch.device("cpu"), seed=0)
        for weight, name in zip(heads.weights, names, strict=True):
            weight.copy_(own[f"w.{name}.weight"])
        losses, rates = [], []
        for i, labels in enumerate(own["in.labels"]):
            factor = cosine(i, hyper["iterations"])
            rows = torch.cat([cls[i].flatten(1), patches[i]], dim=1)
            losses.append(heads.step(rows, labels, factor))
            rates.append([head.rate * factor for head in grid])
        yield compare(f"losses.{precision}", torch.stack(losses), own[f"out{suffix}.losses"], limit)
        if dtype == torch.float64:
            yield compare("lr", torch.tensor(rates, dtype=dtype), own["out64.lr"], limit)
        for i, name in enumerate(names):
            label, wanted = f"{name}.{precision}", below(own, f"out{suffix}.final.{name}.")
            yield compare(f"{label}.weight", heads.weights[i], wanted["weight"], final)
            yield compare(f"{label}.bias", heads.biases[i], wanted["bias"], final)


def d24_features(case: Case, tensors: dict[str, Tensor]) -> Iterator[Check]:
    """What heads read, of a DINOv2 transformer with registers at a size that is not its own."""
    sizes = case["hyper"]["vit"]
    vit = ViT(
        name="vit",
        image_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        position_offset=sizes["interpolate_offset"],
        position_antialias=False,
        embed_dim=sizes["embed_dim"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        num_registers=sizes["registers"],
        init_values=1.0 if sizes["layerscale"] else None,
    ).eval()
    weights = below(tensors, "w.")
    weights.pop("mask_token")  # masks nothing here
    absent = vit.load_state_dict(weights, strict=False)
    lost = [name for name in absent.missing_keys if name != "mask_token"]
    yield Check(f"names {lost + absent.unexpected_keys}", len(lost + absent.unexpected_keys), 0)
    for dtype, precision, suffix in _PRECISIONS:
        vit.to(dtype)
        most = max(case["hyper"]["n_last_blocks"])
        with torch.no_grad():
            blocks = vit.intermediate(tensors["in.x_i8"].to(dtype) / 32, list(range(-most, 0)))
        cls = torch.stack([tokens.cls for tokens in blocks], dim=1)
        none = torch.zeros(len(cls), dtype=torch.int64)
        pooled = Pooled(cls, blocks[-1].patches.mean(dim=1), none, none)
        for num in case["hyper"]["n_last_blocks"]:
            for patches in case["hyper"]["avgpool"]:
                name = f"features_n{num}_avgpool{int(patches)}"
                found = pooled.features(num, patches).features
                limit = bound(case["tolerance"][precision], "features")
                yield compare(f"{name}.{precision}", found, tensors[f"out{suffix}.{name}"], limit)
