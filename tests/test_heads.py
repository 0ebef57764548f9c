"""A grid of linear heads trained at once is what each would be alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dino_lite.eval import probes as module
from dino_lite.eval.linear import RATES
from dino_lite.eval.probes import LinearHeads, cosine, join, make_grid, train
from pooled import draw_pooled, generator

CPU = torch.device("cpu")


def test_each_head_learns_as_it_would_alone() -> None:
    """As torch's linear layer, cross-entropy, SGD and cosine schedule have it, head by head."""
    pooled, num_steps = draw_pooled(24, noise=1.0), 7
    pooled = pooled._replace(cls=pooled.cls.double(), patches=pooled.patches.double())
    grid = make_grid([1, 4], [False, True], [0.3, 2.0], batch_size=64)
    heads = LinearHeads(grid, pooled, 3, CPU, seed=0)
    alone = []
    for i, head in enumerate(grid):
        layer = nn.Linear(heads.weights[i].shape[1], 3).double()
        layer.weight.data.copy_(heads.weights[i])
        layer.bias.data.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=head.rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        alone.append((layer, optimizer, schedule))
    for step in range(num_steps):
        numbers = torch.randperm(24, generator=generator(step))[:8]
        losses = heads.step(*join(pooled, numbers, CPU), cosine(step, num_steps))
        for i, (layer, optimizer, schedule) in enumerate(alone):
            read = pooled.features(grid[i].num_blocks, grid[i].patches).features[numbers]
            loss = F.cross_entropy(layer(read), pooled.labels[numbers])
            torch.testing.assert_close(losses[i], loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for i, (layer, _, _) in enumerate(alone):
        torch.testing.assert_close(heads.weights[i], layer.weight.detach())
        torch.testing.assert_close(heads.biases[i], layer.bias.detach())


@pytest.mark.parametrize("batch_size", [1, 16, 128, 1024])
def test_no_head_hides_another_at_any_batch_size(batch_size: int) -> None:
    """All 52 have weights of their own, and all of them move."""
    pooled = draw_pooled(12)
    grid = make_grid([1, 4], [False, True], RATES, batch_size)
    heads = LinearHeads(grid, pooled, 3, CPU, seed=0)
    before = [weight.clone() for weight in heads.weights]
    heads.step(*join(pooled, torch.arange(12), CPU), 1.0)
    assert len(grid) == len(heads.weights) == 52
    assert len({weight.data_ptr() for weight in heads.weights}) == 52
    assert all(not torch.equal(a, b) for a, b in zip(before, heads.weights, strict=True))


def test_weights_start_small_and_biases_at_zero() -> None:
    """N(0, 0.01²) from the seed; the global generator is left alone."""
    pooled, state = draw_pooled(6, dim=200), torch.random.get_rng_state()
    grid = make_grid([1, 4], [False, True], RATES, 256)
    one, two, other = (LinearHeads(grid, pooled, 3, CPU, seed) for seed in (0, 0, 1))
    drawn = torch.cat([weight.flatten() for weight in one.weights])
    assert float(drawn.std()) == pytest.approx(0.01, rel=0.02)
    assert abs(float(drawn.mean())) < 1e-4
    assert all(not bias.any() for bias in one.biases)
    assert torch.equal(one.weights[-1], two.weights[-1])
    assert not torch.equal(one.weights[-1], other.weights[-1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_measuring_is_by_the_definition_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right where the largest logit is the label's; the loss is the mean cross-entropy."""
    pooled = draw_pooled(11, noise=2.0)
    heads = LinearHeads(make_grid([1, 2], [True], [0.5], 256), pooled, 3, CPU, seed=0)
    train(heads, pooled, 4, 20, seed=0)
    hits, losses = heads.measure(pooled)
    for i, head in enumerate(heads.grid):
        read = pooled.features(head.num_blocks, head.patches).features
        logits = read @ heads.weights[i].T + heads.biases[i]
        assert hits[:, i].tolist() == (logits.argmax(1) == pooled.labels).tolist()
        expected = F.cross_entropy(logits, pooled.labels)
        assert float(losses[i]) == pytest.approx(float(expected), rel=1e-5)
    monkeypatch.setattr(module, "_CELLS", 30)
    again = heads.measure(pooled)
    assert torch.equal(again[0], hits)
    torch.testing.assert_close(again[1], losses)


@pytest.mark.parametrize("per", ["step", "epoch"])
def test_rates_fall_to_zero_and_epochs_are_shuffled(
    per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image once an epoch, but those that fill no batch; rates move each step or epoch."""
    pooled = draw_pooled(10)
    pooled.patches[:, 0] = torch.arange(10)
    heads = LinearHeads(make_grid([1], [False], [0.1], 256), pooled, 3, CPU, seed=0)
    seen: list[tuple[list[float], float]] = []
    monkeypatch.setattr(
        heads, "step", lambda rows, labels, factor: seen.append((rows[:, -5].tolist(), factor))
    )
    epochs: list[int] = []
    train(heads, pooled, 4, 7, seed=0, cosine_per=per, after_epoch=lambda: epochs.append(len(seen)))
    assert epochs == [2, 4, 6, 7]
    for i in (0, 2, 4):
        assert len(set(seen[i][0] + seen[i + 1][0])) == 8
    assert seen[0][0] != seen[2][0]
    places = range(7) if per == "step" else (0, 0, 2, 2, 4, 4, 6)
    assert [factor for _, factor in seen] == pytest.approx(
        [0.5 + 0.5 * math.cos(math.pi * place / 7) for place in places]
    )
