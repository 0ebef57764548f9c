"""The line between two networks, and the choice of a point on it, against plain loops."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from dino_lite.backbones.convnet import ConvNet
from dino_lite.contracts import UserError
from dino_lite.eval.interpolation import ALPHAS, between, estimate_statistics, network_at
from dino_lite.eval.neighbors import nearest
from dino_lite.eval.tradeoff import (
    Change,
    Promise,
    agreement,
    change,
    choose,
    images_to_resolve,
)
from test_vit import randomize


def convnet(seed: int) -> ConvNet:
    """Two stages with batch normalization and generic weights, statistics included."""
    torch.manual_seed(seed)
    backbone = ConvNet("resnet", widths=[6, 8], depths=[1, 1], patch_size=4, norm="batch")
    randomize(backbone)
    with torch.no_grad():
        for name, value in backbone.named_buffers():
            value.fill_(seed) if "num_batches" in name else value.uniform_(0.5, 2)
    return backbone.eval()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit-equal, the sign of zero included."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name])
        and torch.equal(torch.signbit(value), torch.signbit(other[name]))
        for name, value in one.items()
    )


# -------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_between_are_those_of_a_loop_in_double_precision(dtype: torch.dtype) -> None:
    """Rounded once, to the end's dtype, also where start and end are far apart."""
    scale = 10.0 ** torch.arange(-6, 6)
    start, end = ((torch.randn(3, 12) * scale).to(dtype) for _ in range(2))
    for alpha in ALPHAS:
        found = between({"w": start}, {"w": end}, alpha)["w"]
        assert torch.equal(found, oracle.interpolate(start, end, alpha))


def test_the_ends_of_the_line_are_start_and_end_bit_by_bit() -> None:
    """Negative zeros, infinities and counters included; copies, which change with neither."""
    odd = torch.tensor([-0.0, math.inf, 1e-45, 3e38])
    start = {"w": odd, "n": torch.tensor(3)}
    end = {"w": odd.flip(0), "n": torch.tensor(8)}
    kept = copy.deepcopy((start, end))
    for alpha, wanted in ((0.0, start), (1.0, end)):
        found = between(start, end, alpha)
        assert same(found, wanted)
        found["w"].zero_()
    assert same(start, kept[0])
    assert same(end, kept[1])


def test_counters_between_are_the_ends() -> None:
    """A number of batches has no middle."""
    network = network_at(convnet(1), convnet(2), 0.5)
    counters = [value for name, value in network.named_buffers() if "num_batches" in name]
    assert [int(value) for value in counters] == [2] * len(counters)
    assert not network.training


def test_other_weights_have_no_line() -> None:
    """A start of another shape or with other names is a fault of the caller."""
    one = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match="different weights"):
        between(one, {"v": torch.zeros(2)}, 0.5)


def test_statistics_are_those_of_all_images_whatever_the_batches() -> None:
    """Mean and unbiased variance of what a layer got, with batches of 5 and 2 weighed by their
    images; counters and weights stay, and so does the mode.
    """
    backbone = convnet(3)
    norm = next(part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    seen: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    images = torch.randn(7, 3, 8, 8)
    estimate_statistics(backbone, [images[:5], images[5:]])
    hook.remove()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = oracle.channel_statistics(seen)
    assert norm.running_mean.tolist() == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert norm.running_var.tolist() == pytest.approx(variance, rel=1e-5)
    after = backbone.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all(name.endswith(("running_mean", "running_var")) for name in changed)
    assert not any(part.training for part in backbone.modules())
    # The first layer sees the images alone, so its statistics do not depend on the batches.
    again = convnet(3)
    estimate_statistics(again, [images])
    first = next(part for part in again.modules() if isinstance(part, nn.BatchNorm2d))
    torch.testing.assert_close(first.running_mean, norm.running_mean)
    torch.testing.assert_close(first.running_var, norm.running_var)


@torch.no_grad()
def test_estimated_statistics_normalize_where_those_on_the_line_do_not() -> None:
    """Start and end normalize what they compute; the network between them computes something else,
    which the mean of their statistics does not normalize, and its own do.
    """
    images = torch.randn(64, 3, 8, 8)
    start, end = convnet(4), convnet(5)
    for network in (start, end):
        estimate_statistics(network, [images])
    middle = network_at(start, end, 0.5)
    norm = next(part for part in middle.modules() if isinstance(part, nn.BatchNorm2d))
    norm.weight.fill_(1)
    norm.bias.zero_()
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    middle(images)
    assert abs(float(seen.pop().std()) - 1) > 0.1
    estimate_statistics(middle, [images])
    seen.clear()
    middle(images)
    assert float(seen[0].mean()) == pytest.approx(0, abs=1e-4)
    assert float(seen[0].std()) == pytest.approx(1, abs=1e-2)


# --------------------------------------------------------------------------------------- choice


@given(
    gains=st.lists(st.integers(-3, 3), min_size=1, max_size=11),
    losses=st.lists(st.lists(st.integers(-3, 3), min_size=11, max_size=11), max_size=2),
    max_loss=st.sampled_from([None, 0.0, 1.0, 2.5]),
)
def test_the_choice_is_that_of_a_loop(
    gains: list[int], losses: list[list[int]], max_loss: float | None
) -> None:
    """Many equal gains; every kept collection counts; the start, with a gain of 0, is always
    allowed.
    """
    gains[0] = 0
    for each in losses:
        each[0] = 0
    assert choose(gains, losses, max_loss) == oracle.best_point(gains, losses, max_loss)


def test_planted_choices() -> None:
    """The largest gain within the limit; the smaller of equal ones; the start where all lose."""
    gains = [0.0, 2.0, 5.0, 5.0, 9.0]
    losses = [0.0, 0.2, 0.9, 1.0, 1.1]
    assert choose(gains, [losses], 1.0) == 2
    assert choose(gains, [losses], None) == 4
    assert choose(gains, [losses, [0, 0, 1.5, 0, 0]], 1.0) == 3
    assert choose(gains, [[0, 1, 1, 1, 1]], 0.5) == 0
    assert choose([0.0, -1.0, -2.0], [], None) == 0


def test_the_limit_is_automatic_where_something_can_be_lost() -> None:
    """1 point with a labeled collection, else off; a limit on nothing is refused."""
    assert Promise().limit(True) == 1.0
    assert Promise().limit(False) is None
    assert Promise(max_loss=None).limit(True) is None
    assert Promise(max_loss=0.3).limit(True) == 0.3
    with pytest.raises(UserError, match=r"adapt.max_loss=0.3 .* keep.root="):
        Promise(max_loss=0.3).limit(False)


def test_the_bootstrap_draws_both_scores_of_an_image_together() -> None:
    """The percentiles of a loop over the same draws."""
    before, after = (100.0 * (torch.rand(2, 9) < 0.6)).unbind()
    found = change(before, after)
    draws = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (1000, 9)))
    means = oracle.paired_bootstrap(before, after, draws)
    assert found.value == pytest.approx(float((after - before).mean()))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))
    assert found.num == 9


def test_a_paired_interval_is_narrower_where_the_same_images_are_hard() -> None:
    """1,000 images, half of them always wrong; 20 change: the standard error is that of 20."""
    before = torch.zeros(1000)
    before[:500] = 100
    after = before.clone()
    after[:10], after[500:510] = 0, 100
    found = change(before, after)
    assert found.value == 0
    assert found.half_width == pytest.approx(1.96 * 100 * math.sqrt(20) / 1000, rel=0.1)


def test_images_that_never_change_do_not_prove_that_none_would() -> None:
    """Of 4 images none changes: up to 75 % may still."""
    found = change(torch.zeros(4), torch.zeros(4))
    assert (found.low, found.high) == (0, 0)
    assert found.half_width == 75
    assert images_to_resolve(found, 1.0) == 300


def test_how_many_images_would_tell_a_loss() -> None:
    """Half widths fall with the root of the number; no number tells a loss of nothing."""
    found = Change(-0.5, -2.5, 1.5, 500)
    assert images_to_resolve(found, 1.0) == 2000
    assert images_to_resolve(found, 2.0) == 500
    assert images_to_resolve(found, 4.0) < 500
    assert images_to_resolve(found, 0) == math.inf


def test_agreement_is_that_of_a_loop() -> None:
    """The share of common neighbors in two feature spaces; all with itself."""
    queries, banks = torch.randn(2, 6, 5), torch.randn(2, 15, 5)
    found: list[Any] = [nearest(q, b, 4)[1] for q, b in zip(queries, banks, strict=True)]
    wanted = oracle.shared_neighbors(queries[0], queries[1], (banks[0], banks[1]), 4)
    assert torch.equal(agreement(*found), wanted)
    assert 0 < float(wanted.mean()) < 100
    assert agreement(found[0], found[0]).tolist() == [100] * 6
