"""Golden cases B14 and B14b: block masks, how a batch samples them, and where they are.

Masks are random, so their statistics are held against the reference's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dino_lite.nn import masking
from dino_lite.nn.masking import BlockMasking, choose_block
from dino_lite.nn.masks import masks_of
from golden.adapters_augmentation import ks_distance, number, proportion
from golden.adapters_core import below
from golden.check import Bound, Check, compare

NUM_CROPS = 10_000  # five times the reference's draws: the spread is then mostly its own
Case = dict[str, Any]
Tensors = dict[str, Tensor]


def b14(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Blocks on three grids: how many, how large, of what shape, where, and how much they lack."""
    errors = number(case["tolerance"]["statistics"], r"within (\d+) standard")
    limit = number(case["tolerance"]["statistics"], r"below ([\d.]+)\*sqrt")
    for name, data in case["data"].items():
        own, num = below(tensors, f"{name}/out."), data["draws"]
        found = drawn(data, tuple(data["target_ratio_range"]))
        # The case's first blocks are those of crops with all the room that a block may take.
        most = (data["max_num_patches"] + 0.5) / data["grid"] ** 2
        found |= {
            key: sample for key, sample in drawn(data, (most, most)).items() if "first" in key
        }
        yield Check(f"{name} overshoot", -float(found["shortfall_patches"].min()), 0)
        for quantity in ("realised_ratio", "shortfall", "n_blocks"):
            mean = found.get(quantity, found["shortfall_patches"]).mean()
            allowed = errors * data[f"{quantity}_std"] / num**0.5
            yield Check(f"{name} {quantity}", abs(mean - data[f"{quantity}_mean"]), allowed)
        for quantity, sample in found.items():
            allowed = limit * (1 / len(sample) + 1 / num) ** 0.5
            if f"{quantity}.quantiles101" in own:
                distance = ks_distance(np.sort(sample), own[f"{quantity}.quantiles101"].numpy())
                yield Check(f"{name} {quantity} KS", distance, allowed)
            if f"{quantity}.hist" in own:
                wanted = own[f"{quantity}.hist"].numpy()
                counted = np.bincount(sample.astype(int), minlength=len(wanted))
                distance = np.cumsum(counted / len(sample))[: len(wanted)] - np.cumsum(wanted) / num
                yield Check(f"{name} {quantity} KS", float(np.abs(distance).max()), allowed)
        where, wanted = found["cells"].mean(0), own["cell_frequency"].numpy()
        deviation = np.sqrt(wanted * (1 - wanted) * (1 / num + 1 / NUM_CROPS))
        worst = float((np.abs(where - wanted) / deviation).max())
        yield Check(f"{name} cells, deviations", worst, errors)
        for target, fixed in data["fixed_target"].items():
            ratio = (int(target) + 0.5) / data["grid"] ** 2
            found = drawn(data, (ratio, ratio))
            yield Check(f"{name} {target} overshoot", -float(found["shortfall_patches"].min()), 0)
            for quantity in ("masked", "boundary_edges"):
                allowed = errors * fixed[f"std_{quantity}"] / fixed["draws"] ** 0.5
                error = abs(found[quantity].mean() - fixed[f"mean_{quantity}"])
                yield Check(f"{name} {target} {quantity}", error, allowed)
            full = int((found["masked"] == int(target)).sum())
            counted = round(fixed["fraction_exact"] * fixed["draws"])
            yield proportion(
                f"{name} {target} exact", full, NUM_CROPS, counted, fixed["draws"], errors
            )


def drawn(data: Case, ratio: tuple[float, float]) -> dict[str, np.ndarray]:
    """Many masks as the reference draws them, in the numbers that the case has of each."""
    side, blocks = data["grid"], []
    settings = {
        "ratio": ratio,
        "sample_prob": 1.0,
        "min_patches": data["min_num_patches"],
        "min_aspect": data["min_aspect"],
    }

    def kept(*given: Any) -> np.ndarray:
        blocks.append(choose_block(*given))
        return blocks[-1]

    with mock.patch.object(masking, "choose_block", kept):
        masks = BlockMasking(**settings, exact=False).draw(NUM_CROPS, (side, side), 0)
    whole = BlockMasking(**settings, exact=True).draw(NUM_CROPS, (side, side), 0)
    first = blocks[0]  # of all crops; each that got a block is tried again
    added = np.array([block.any((1, 2)).sum() for block in blocks] + [0])
    masked = masks.sum((1, 2))
    edges = [(masks[:, 1:] ^ masks[:, :-1]), (masks[..., 1:] ^ masks[..., :-1])]
    return {
        "masked": masked,
        "realised_ratio": masked / side**2,
        "shortfall_patches": whole.sum((1, 2)) - masked,
        "n_blocks": np.repeat(np.arange(1, len(added)), -np.diff(added)),
        "first_block_area": first.sum((1, 2)),
        "first_block_log_aspect_h_over_w": np.log(first.any(2).sum(1) / first.any(1).sum(1)),
        "boundary_edges": sum(edge.sum((1, 2)) for edge in edges),
        "cells": masks,
    }


def b14b(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """Which crops of a batch are masked and how far; indices and weights of given masks."""
    for name in ("batch0", "batch1"):
        own = below(tensors, f"{name}/")
        masks = own["in.masks"].numpy()
        num, wide = len(masks), torch.zeros((), dtype=torch.float64)
        # All crops as if of one image: then ours is the reference's order.
        found = masks_of(masks[:, None], wide)
        yield compare(f"{name} indices", found.rows, own["out.mask_indices_list"], Bound())
        limit = Bound(number(case["tolerance"]["exact"], r"rtol ([\de.-]+)"))
        yield compare(f"{name} weights", found.weight * num, own["out.masks_weight"], limit)
        yield compare(f"{name} count", found.bounds[-1], own["out.n_masked_patches"][0], Bound())
        # In pairs, image by image, as a step has them: the same set.
        paired = masks_of(masks.reshape(2, num // 2, -1), wide)
        order = paired.rows.argsort()
        yield compare(f"{name} paired", paired.rows[order], own["out.mask_indices_list"], Bound())
        weights = paired.weight[order] * num
        yield compare(f"{name} paired weights", weights, own["out.masks_weight"], limit)
    hyper, data, side = case["hyper"], case["data"], case["hyper"]["grid"]
    masking_ = BlockMasking(
        hyper["mask_ratio_min_max"], hyper["mask_sample_probability"], exact=False
    )
    num = data["draws"]
    batches = [masking_.draw(data["global_crops"], (side, side), step) for step in range(num)]
    counts = np.stack(batches).sum((2, 3))  # draws crops
    errors = number(case["tolerance"]["statistics"], r"(\d+) standard")
    some = (counts > 0).sum(1)
    yield Check("fewest masked crops", float(data["masked_images_min"] - some.min()), 0)
    yield Check("most masked crops", float(some.max() - data["masked_images_max"]), 0)
    total = counts.sum(1)
    allowed = errors * data["total_masked_std"] / num**0.5
    yield Check("all masked", abs(total.mean() - data["total_masked_mean"]), allowed)
    yield Check("upper bound", float(max(0, total.max() - data["upperbound"][0])), 0)
    by_size = np.sort(counts, axis=1)[:, : -data["masked_images_max"] - 1 : -1].mean(0)
    spread = tensors["out.sorted_masked_counts_std"].numpy() / num**0.5
    distance = np.abs(by_size - tensors["out.sorted_masked_counts_mean"].numpy()) / spread
    yield Check("masked by rank, errors", float(distance.max()), errors)
    for i, fraction in enumerate(data["fraction_masked_by_position"]):
        found_here = int((counts[:, i] > 0).sum())
        yield proportion(f"crop {i}", found_here, num, round(fraction * num), num, errors)
