"""Born-Again Networks: a network learns from the predictions of an equal one, its teacher.

Furlanello et al. 2018 (arXiv 1805.04770).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dino_lite.eval.agreement import Standing, learned_mistakes
from dino_lite.eval.results import bootstrap, interval, percent

BornAgain = Literal["labels+logits", "logits", "cwtm", "dkpp"]


class Predictions(NamedTuple):
    """Predicted classes of the readable test images by each of g generations and by the mean of
    their probabilities, and the true ones; on the host.
    """

    each: Int[Tensor, "g n"]
    ensemble: Int[Tensor, "n"]
    labels: Int[Tensor, "n"]


def born_again_loss(
    logits: Float[Tensor, "n C"],
    teacher: Float[Tensor, "n C"],
    wanted: Float[Tensor, "n C"],
    objective: BornAgain,
    temperature: float,
    generator: np.random.Generator,
) -> Float[Tensor, ""]:
    """The loss of a generation, from its logits, those of its teacher for the same images, and the
    labels as distributions (section 3).

    "logits": cross-entropy with the teacher's distribution. "labels+logits": plus that with the
    labels. "cwtm": labels alone, each image weighted by the teacher's largest probability.
    "dkpp": as "logits", but the teacher's other probabilities are permuted within each image, by
    draws from `generator`. `temperature` divides the logits of both, and its square multiplies
    that cross-entropy (Hinton et al. 2015, section 2).
    """
    if objective == "cwtm":
        weight = teacher.softmax(dim=1).amax(dim=1)
        return (weight / weight.sum()) @ F.cross_entropy(logits, wanted, reduction="none")
    probs = (teacher / temperature).softmax(dim=1)
    if objective == "dkpp":
        probs = permuted(probs, generator)
    loss = temperature**2 * F.cross_entropy(logits / temperature, probs)
    return loss + F.cross_entropy(logits, wanted) if objective == "labels+logits" else loss


def permuted(probs: Float[Tensor, "n C"], generator: np.random.Generator) -> Float[Tensor, "n C"]:
    """Each row with all but its largest value in random order."""
    top = probs.argmax(dim=1, keepdim=True)
    draws = torch.from_numpy(generator.random(probs.shape)).to(probs.device)
    columns = torch.arange(probs.shape[1], device=probs.device).expand(probs.shape)
    # The largest comes first in both orders, so that it keeps its place.
    source = draws.scatter(1, top, -1.0).argsort(dim=1)
    target = columns.scatter(1, top, -1).argsort(dim=1)
    return torch.empty_like(probs).scatter_(1, target, probs.gather(1, source))


def generations_told(found: Predictions) -> dict[str, Any]:
    """Accuracy of each generation and of their ensemble, and each one's agreement with its teacher,
    in percent of the test images: entries of a result.
    """
    agreement = [None, *(float(percent(a == b).mean()) for a, b in pairwise(found.each))]
    rows: list[dict[str, Any]] = [
        _share(predicted == found.labels) | {"agreement": agreed}
        for predicted, agreed in zip(found.each, agreement, strict=True)
    ]
    ensemble = _share(found.ensemble == found.labels)
    stages = [
        Standing(f"generation {i}", row["top1"], row["agreement"], len(found.labels))
        for i, row in enumerate(rows, 1)
    ]
    names = [*(str(i) for i in range(1, len(rows) + 1)), "ensemble"]
    warnings = learned_mistakes(stages)
    return {
        "generations": rows,
        "ensemble": ensemble,
        **({"warnings": warnings} if warnings else {}),
        "table": [
            {
                "generation": name,
                "top-1 %": row["top1"],
                "95 % interval": interval({"unit": "%"} | row),
                "agreement with its teacher %": "" if (a := row.get("agreement")) is None else a,
            }
            for name, row in zip(names, [*rows, ensemble], strict=True)
        ],
    }


def _share(correct: Bool[Tensor, "n"]) -> dict[str, Any]:
    scores = percent(correct)
    return {"top1": float(scores.mean()), "interval": list(bootstrap(scores))}
