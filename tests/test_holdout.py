"""What is held out of a labeled set."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dino_lite.data.subset import hold_out


@given(
    labels=st.lists(st.integers(-3, 5), min_size=1, max_size=60),
    share=st.sampled_from([0.1, 0.2, 0.5]),
    seed=st.integers(0, 5),
)
def test_of_each_class_its_share_is_held_out(labels: list[int], share: float, seed: int) -> None:
    """Every row is in one part; at least one of a class is held out, and never all."""
    kept, held = hold_out(torch.tensor(labels), share, seed)
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(labels)))
    assert kept.tolist() == sorted(kept.tolist())
    assert held.tolist() == sorted(held.tolist())
    for label in set(labels):
        total = labels.count(label)
        out = sum(labels[i] == label for i in held.tolist())
        assert out == min(total - 1, max(1, round(share * total)))


def test_the_seed_decides_which() -> None:
    """The same for the same seed, others for another, not the first or last rows."""
    labels = torch.arange(300) % 3
    assert torch.equal(hold_out(labels, 0.1, 0)[1], hold_out(labels, 0.1, 0)[1])
    held = hold_out(labels, 0.1, 0)[1]
    assert not torch.equal(held, hold_out(labels, 0.1, 1)[1])
    assert 100 < float(held.double().mean()) < 200
