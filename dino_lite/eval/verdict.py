"""What results mean, in words: a backbone against its baselines, and a run that has ended."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dino_lite.eval.baselines import knn_result
from dino_lite.eval.collapse import could_alarm
from dino_lite.eval.curves import PROTOTYPES, num_prototypes, number
from dino_lite.wording import count

_FEW = 2000  # images below which pretrained weights are advised


class Judgment(NamedTuple):
    """Whether a result is better than all baselines, and both in words, without a full stop."""

    learned: bool
    text: str


def exceeds(found: Mapping[str, Any], other: Mapping[str, Any]) -> bool | None:
    """Whether the value of `found` is above that of `other`; None if it is, but not beyond the
    95 % interval of the difference, or if an interval is unknown.

    The interval of the difference is computed from both intervals (Zou and Donner 2008, for
    independent values; it is wider than needed for results on the same images).
    """
    difference = found["value"] - other["value"]
    if not difference > 0:
        return False
    if not found.get("interval") or not other.get("interval"):
        return None
    down = found["value"] - found["interval"][0]
    up = other["interval"][1] - other["value"]
    return True if difference > math.hypot(down, up) else None


def judge(found: Mapping[str, Any]) -> Judgment | None:
    """A result in percent against its baselines; None without baselines."""
    others = {
        title: other
        for title, other in (found.get("baselines") or {}).items()
        if isinstance(other.get("value"), int | float)
    }
    if found.get("unit") != "%" or not others:
        return None
    titles = sorted(others, key=lambda title: title != "untrained")
    above = {title: exceeds(found, others[title]) for title in titles}
    against = " and ".join(f"{others[title]['value']:.1f} % {title}" for title in titles)
    unknown = any(not each.get("interval") for each in (found, *others.values()))
    within = "without confidence intervals" if unknown else "within the uncertainty"
    num = found.get("num_test")
    if all(above.values()):
        head = "learned"
    elif above.get("untrained"):
        low = any(value is False for value in above.values())
        head = "learned, but raw pixels are as good or better"
        head = head if low else f"learned, but maybe no more than raw pixels ({within})"
    elif any(value is False for value in above.values()):
        head = "nothing was learned yet"
    elif unknown:
        head = f"not known whether anything was learned ({within})"
    else:
        images = f"{num:,} images" if num else "the images"
        head = f"nothing was learned yet that {images} can show ({within})"
    interval = found.get("interval")
    span = f", 95 % interval {interval[0]:.1f} to {interval[1]:.1f}" if interval else ""
    text = f"{head}: {found['value']:.1f} % against {against} ({found['metric']}{span})"
    return Judgment(all(above.values()), text)


def verdict(
    results: Mapping[str, Any], curves: Mapping[str, np.ndarray], run: str = "latest"
) -> list[str]:
    """Sentences about a trained run, from its results.json and metrics.csv: what was learned, what
    to do next, where the labels came from, and the state of the features. `run` is its name in
    commands.
    """
    lines = [*_accuracy(results, curves, run)]
    if labels := results.get("labels"):
        lines.append(f"{labels}.")
    lines += [health_line(results, curves), skipped_line(results, curves), *alarms(results)]
    return [line for line in lines if line]


def _accuracy(results: Mapping[str, Any], curves: Mapping[str, np.ndarray], run: str) -> list[str]:
    judgment = judge(found) if (found := knn_result(results)) else None
    if judgment is not None:
        begun = results.get("started_from")
        weights = f" It began with the weights of {begun}, which are part of that." if begun else ""
        next_step = "" if judgment.learned else advice(results)
        return [f"{judgment.text}.{weights}", next_step]
    if reason := results.get("knn_failed"):
        return [f"k-NN was not measured: {reason}"]
    if results.get("num_classes") == 0:
        return [
            "Without labels there is no accuracy: see in neighbors.png whether images resemble "
            "their nearest neighbors. For a number, give labels to dino-lite evaluate: class "
            "folders, or data.labels=FILE.csv."
        ]
    last = f", {curves['knn'][-1, 1]:.1f} % on train at the end," if "knn" in curves else ""
    asked = ", as baselines=false asks" if results.get("baselines") is False else ""
    command = shlex.join(["dino-lite", "evaluate", f"checkpoint={run}", "baselines=true"])
    return [f"k-NN{last} was not compared with baselines{asked}: {command} does that."]


def advice(results: Mapping[str, Any]) -> str:
    """What to do about a run that has not learned enough."""
    if alarms(results):
        return "Next: do what the warning below says."
    seen = results.get("epochs")
    told = "" if seen is None else f" (this one saw each image {seen:,.3g} times)"
    few = results.get("num_images", _FEW) < _FEW
    start = (
        ", or start from pretrained weights: backbone.pretrained=FILE (a dino_lite export, or "
        "published weights: of a ResNet or ConvNeXt alone, of a ViT with its backbone, as in "
        "backbone=vit_small)"
    )
    return (
        f"Next: train longer{told}, as another run: name=NEW and a larger trainer.max_time, "
        f"trainer.max_epochs or trainer.max_steps{start if few else ''}."
    )


def alarms(results: Mapping[str, Any]) -> list[str]:
    """The run's warnings with their steps, but those of skipped steps: `skipped_line` has their
    final number.
    """
    warnings = results.get("warnings") or ()
    failures = [each for each in warnings if not str(each.get("kind")).startswith("skipped")]
    return [f"At step {each['step']:,}, {each['text']}" for each in failures]


def skipped_line(results: Mapping[str, Any], curves: Mapping[str, np.ndarray]) -> str:
    """How many steps were skipped; "" for none, or if their number was not logged."""
    points = curves.get("skipped_total", np.zeros((1, 2)))
    num = int(results.get("skipped_total", points[-1, 1]))
    steps = results.get("steps") or int(points[-1, 0]) + 1
    if not num:
        return ""
    return (
        f"{num:,} of {count(steps, 'step')} had a gradient that is not finite and were skipped, "
        "which changes no weight; if that is many, trainer.precision=32 or a lower optim.rate may "
        "help."
    )


def health_line(results: Mapping[str, Any], curves: Mapping[str, np.ndarray]) -> str:
    """The last health statistics, and whether a collapse was seen; "" if nothing was logged."""
    told = []
    if "prototype_perplexity" in curves:
        told.append(f"{PROTOTYPES.lower()} {prototypes_text(curves)}")
    if "rankme" in curves:
        told.append(f"effective rank of the features {number(curves['rankme'][-1, 1])}")
    if not told:
        return ""
    samples = curves.get("embedding_std", np.empty((0, 2)))[:, 0]
    if not alarms(results) and could_alarm(samples, results.get("steps")):
        told.insert(0, "no sign of collapse")
    return f"Health: {', '.join(told)}."


def unreadable_line(num: int) -> str:
    """The number of images that could not be read; "" for 0."""
    told = "could not be read (bad_files.csv): training used others, evaluation left them out"
    return f"{count(num, 'image')} {told}." if num else ""


def prototypes_text(curves: Mapping[str, np.ndarray]) -> str:
    """The last effective number of prototypes, "477.6 of 512", as curves show it."""
    total = num_prototypes(curves)
    value = number(curves["prototype_perplexity"][-1, 1])
    return value if total is None else f"{value} of {total:,}"


def loss_line(curves: Mapping[str, np.ndarray]) -> str:
    """First and last logged loss and what it contains; "" if none was logged."""
    if "loss" not in curves:
        return ""
    points = curves["loss"][:, 1]
    first = f"{points[0]:.3f} at first, " if len(points) > 1 else ""
    return f"Loss: {first}{points[-1]:.3f} at the end. {_contents(curves)}."


def loss_note(curves: Mapping[str, np.ndarray]) -> str:
    """What the loss contains, and what to expect of it."""
    return f"{_contents(curves)}: {expectation('knn' in curves)}."


def expectation(labeled: bool) -> str:
    """What to expect of the loss, and what measures quality instead, without a full stop."""
    instead = "k-NN does" if labeled else "neighbors.png shows it"
    return f"the loss may rise at first and does not measure quality; {instead}"


# Losses of distillation, by their names in conf/loss.
_OF_FROZEN = {"cls_token", "patch_tokens", "masked_tokens", "cls_similarity", "patch_similarity"}


def _contents(curves: Mapping[str, np.ndarray]) -> str:
    """With prototypes the loss is the entropy of the teacher's targets plus the divergence from
    them, and centering raises the former at first.
    """
    if "teacher_entropy" in curves:
        return (
            "It includes the entropy of the teacher's targets, which grows while these spread over "
            "the prototypes"
        )
    if curves.keys() & _OF_FROZEN:
        return "It compares the student with a frozen teacher"
    return "It compares the student with a teacher that changes too"
