"""Evaluations of one backbone, and of its baselines, on one data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from dino_lite.contracts import Backbone, Evaluation
from dino_lite.eval.results import amount, interval
from dino_lite.eval.store import FeatureStore
from dino_lite.meter import named

Made = Callable[[str, dict[str, Any]], object]  # receives name and result


def measure(
    backbone: Backbone,
    store: FeatureStore,
    evaluations: Mapping[str, Evaluation],
    made: Made = lambda name, found: None,
) -> dict[str, dict[str, Any]]:
    """Each evaluation's result, with data, pixels, unreadable images and seconds; `made` gets each
    as soon as it is known.
    """
    results = {}
    for name, evaluation in evaluations.items():
        started, data = time.monotonic(), store.data
        with named(name):
            found = evaluation(backbone, store)
        about = {
            "data": data.splits.name,
            "image_size": data.preprocessing.pixels,
            "unreadable": len(data.bad),
        }
        found = about | found  # an evaluation with images of its own sets these keys itself
        results[name] = found | {"seconds": round(time.monotonic() - started, 2)}
        made(name, results[name])
    return results


def comparable(evaluations: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """The evaluations whose results are compared with those of the baselines."""
    return {name: each for name, each in evaluations.items() if each.has_baselines}


def beside(found: dict[str, Any], title: str, baseline: Mapping[str, Any]) -> dict[str, Any]:
    """The result `found` with that of the baseline `title` among its "baselines"."""
    own = {key: baseline[key] for key in ("value", "interval")}
    return found | {"baselines": found.get("baselines", {}) | {title: own}}


def line(name: str, found: Mapping[str, Any]) -> str:
    """A result in one line."""
    bounds = f" ({interval(found)})" if found["interval"] else ""
    return f"{name}: {found['metric']} {amount(found)}{bounds}, {found['seconds']:.1f} s"
