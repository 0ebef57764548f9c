"""What an evaluation gives back."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dino_lite.eval.results import amount, bootstrap, percent, result


@pytest.mark.slow
@pytest.mark.parametrize(("num", "share"), [(50, 0.5), (1000, 0.9), (20_000, 0.3)])
def test_the_interval_is_that_of_a_binomial(num: int, share: float) -> None:
    """For right and wrong answers theory knows it: 1.96 standard errors on each side."""
    correct = torch.arange(num) < round(num * share)
    low, high = bootstrap(percent(correct))
    half = 196 * math.sqrt(share * (1 - share) / num)
    assert low == pytest.approx(100 * share - half, abs=0.2 * half)
    assert high == pytest.approx(100 * share + half, abs=0.2 * half)


def test_the_same_scores_have_the_same_interval() -> None:
    """Nothing is left to chance, and the global generator is left alone."""
    scores = torch.rand(100)
    state = torch.random.get_rng_state()
    assert bootstrap(scores) == bootstrap(scores)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bootstrap(torch.full((5,), 3.0)) == (3.0, 3.0)


def test_a_result_is_plain_json() -> None:
    """With what the protocol was, and what else an evaluation has to tell."""
    found = result(
        "top-1",
        50.0,
        protocol="by a coin",
        settings={"k": 3},
        num_train=2,
        num_test=4,
        scores=percent(torch.tensor([True, False, True, False])),
        table=[{"k": 3, "top-1 %": 50.0}],
    )
    assert json.loads(json.dumps(found)) == found
    assert found["interval"][0] < 50 < found["interval"][1]
    assert found["table"][0]["k"] == 3
    assert result("x", 1.0, protocol="", settings={}, num_train=1, num_test=1)["interval"] is None


def test_amounts_are_told_with_their_unit() -> None:
    """Percent with two digits, counts whole, anything else with four."""
    assert amount({"value": 71.234, "unit": "%"}) == "71.23 %"
    assert amount({"value": 12345, "unit": "pairs"}) == "12,345 pairs"
    assert amount({"value": 0.12345, "unit": "R2"}) == "0.1235 R2"
