"""Average accuracy, forgetting and transfer of planted histories, against the papers' sums."""

from __future__ import annotations

import pytest

from dino_lite.eval.history import History

# Row 0 is the start; three collections, learned by stages 1, 2 and 3.
PLANTED = [
    [20.0, 30.0, 40.0],
    [80.0, 36.0, 41.0],
    [85.0, 70.0, 49.0],
    [60.0, 64.0, 90.0],
]


def test_a_planted_history_gives_the_sums_of_the_papers() -> None:
    """Lopez-Paz & Ranzato 2017, section 3, and Chaudhry et al. 2018, section 3, by hand."""
    history = History(PLANTED, [1, 2, 3])
    assert history.average_accuracy() == pytest.approx((60 + 64 + 90) / 3)
    assert history.backward_transfer() == pytest.approx(((60 - 80) + (64 - 70)) / 2)
    # The first collection was best after stage 2, not after its own.
    assert history.forgetting() == pytest.approx(((85 - 60) + (70 - 64)) / 2)
    assert history.forward_transfer() == pytest.approx(((36 - 30) + (49 - 40)) / 2)


def test_plain_loops_agree_on_random_histories() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    for num in (2, 3, 5):
        r = rng.uniform(0, 100, (num + 1, num))
        history = History(r.tolist(), list(range(1, num + 1)))
        bwt = [r[num, i] - r[i + 1, i] for i in range(num - 1)]
        fwt = [r[i, i] - r[0, i] for i in range(1, num)]
        lost = [max(r[stage, i] for stage in range(1, num)) - r[num, i] for i in range(num - 1)]
        assert history.average_accuracy() == pytest.approx(float(np.mean(r[num])))
        assert history.backward_transfer() == pytest.approx(float(np.mean(bwt)))
        assert history.forward_transfer() == pytest.approx(float(np.mean(fwt)))
        assert history.forgetting() == pytest.approx(float(np.mean(lost)))


def test_what_the_start_knew_counts_from_the_start() -> None:
    history = History([[90.0, 20.0], [70.0, 60.0]], [0, 1])
    assert history.average_accuracy() == pytest.approx(65.0)
    assert history.backward_transfer() == pytest.approx(-20.0)
    assert history.forgetting() == pytest.approx(20.0)
    assert history.forward_transfer() is None


def test_collections_to_come_count_only_for_what_is_measured_of_them() -> None:
    history = History(PLANTED[:3], [1, 2, 3])
    assert history.average_accuracy() == pytest.approx((85 + 70) / 2)
    assert history.forgetting() == pytest.approx(80 - 85)
    assert history.forward_transfer() == pytest.approx(36 - 30)


def test_collections_without_labels_are_left_out() -> None:
    history = History([[None, 10.0], [None, 20.0], [None, 50.0]], [1, 2])
    assert history.average_accuracy() == pytest.approx(50.0)
    assert history.forgetting() is None
    assert history.forward_transfer() == pytest.approx(10.0)
