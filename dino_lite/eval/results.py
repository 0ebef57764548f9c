"""The result of an evaluation: one number, its interval, and its protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_RESAMPLES = 1000
_CELLS = 2**24  # draws held at once
_BLOCK = 50  # samples counted at once


def result(
    metric: str,
    value: float,
    *,
    protocol: str,
    settings: dict[str, Any],
    num_train: int,
    num_test: int,
    scores: Float[Tensor, "n"] | None = None,
    unit: str = "%",
    notes: Sequence[str] = (),
    **details: Any,
) -> dict[str, Any]:
    """Plain JSON. `value` is the headline in `unit`; `scores`, one per test image and in the same
    unit, average to it and are resampled for the 95 % `interval`.

    `settings` are the values of the protocol (k, temperature, rate …). `notes` say where they are
    not what was asked for, without a full stop; `details` may hold a "table" of records with equal
    keys: both are shown in the terminal and the report.
    """
    return {
        "metric": metric,
        "value": value,
        "unit": unit,
        "interval": None if scores is None else list(bootstrap(scores)),
        "protocol": protocol,
        "settings": settings,
        "num_train": num_train,
        "num_test": num_test,
        **({"notes": list(notes)} if notes else {}),
        **details,
    }


def reduced(name: str, asked: Iterable[int], most: int, what: str) -> list[str]:
    """A note if a number in `asked` is above `most`, to which it was reduced; `what` explains that
    limit.
    """
    above = sorted({num for num in asked if num > most})
    return [f"{name}={', '.join(map(str, above))} reduced to {most:,}, {what}"] if above else []


def bootstrap(scores: Float[Tensor, "n"], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: percentiles 2.5 and 97.5 of the means of 1,000 samples
    with replacement (Efron 1979), drawn from `seed`.
    """
    values = scores.double().cpu().numpy()
    generator = np.random.default_rng(seed)
    block = max(1, _CELLS // max(len(values), 1))
    means = [
        values[generator.integers(0, len(values), (min(block, _RESAMPLES - done), len(values)))]
        .mean(axis=1)
        .tolist()
        for done in range(0, _RESAMPLES, block)
    ]
    low, high = np.percentile([mean for part in means for mean in part], (2.5, 97.5))
    return float(low), float(high)


def resampled(
    statistic: Callable[[Float[Tensor, "m n"]], Float[Tensor, "m"]], num: int, seed: int = 0
) -> tuple[float, float]:
    """As `bootstrap`, for a statistic other than a mean: `statistic` computes it from the counts of
    each of `num` images, for m samples at once.
    """
    generator, shares = np.random.default_rng(seed), np.full(num, 1 / num)
    found = [
        statistic(torch.from_numpy(generator.multinomial(num, shares, _BLOCK)).double())
        for _ in range(0, _RESAMPLES, _BLOCK)
    ]
    low, high = np.percentile(torch.cat(found).numpy(), (2.5, 97.5))
    return float(low), float(high)


def percent(correct: Tensor) -> Float[Tensor, "n"]:
    """100 where true, 0 where false."""
    return 100.0 * correct.to(torch.float64)


def amount(found: Mapping[str, Any]) -> str:
    """The value of a result with its unit."""
    if found["unit"] == "%":
        return f"{found['value']:.2f} %"
    if isinstance(found["value"], int):  # a count
        return f"{found['value']:,} {found['unit']}".rstrip()
    return f"{found['value']:.4g} {found['unit']}".rstrip()


def interval(found: Mapping[str, Any]) -> str:
    """The bounds of the interval as text, "" without one."""
    if found["interval"] is None:
        return ""
    digits = ".2f" if found["unit"] == "%" else ".4g"
    return " to ".join(f"{bound:{digits}}" for bound in found["interval"])


def short(value: Any) -> str:
    """A setting or a cell of a result's table as text."""
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"
    return str(value)
