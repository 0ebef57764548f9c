"""Evaluations of one backbone, and of its baselines, on one data set."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dino_lite.contracts import Backbone, Evaluation
from dino_lite.eval.store import FeatureStore


def measure(
    backbone: Backbone, store: FeatureStore, evaluations: Mapping[str, Evaluation]
) -> dict[str, dict[str, Any]]:
    """Each evaluation's result, with data, pixels, unreadable images and seconds."""
    results = {}
    for name, evaluation in evaluations.items():
        started, data = time.monotonic(), store.data
        found = evaluation(backbone, store)
        about = {"data": data.splits.name, "image_size": data.size, "unreadable": len(data.bad)}
        found = about | found  # an evaluation with images of its own sets these keys itself
        results[name] = found | {"seconds": round(time.monotonic() - started, 2)}
    return results


def comparable(evaluations: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """The evaluations whose results are compared with those of the baselines."""
    return {name: each for name, each in evaluations.items() if each.has_baselines}


def beside(
    results: Mapping[str, dict[str, Any]], baselines: Mapping[str, Mapping[str, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """`results` with those of each baseline under "baselines", if the evaluation has them."""
    return {
        name: found
        | {
            "baselines": {
                title: {key: others[name][key] for key in ("value", "interval")}
                for title, others in baselines.items()
                if name in others
            }
        }
        for name, found in results.items()
    }
