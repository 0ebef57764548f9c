"""Adds to a trained run its pictures, and its k-NN accuracy compared with the baselines; ends with
a verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dino_lite.config import Config, instantiate
from dino_lite.contracts import Backbone, Splits, UserError
from dino_lite.data.clean import CleanData, preprocessing_of
from dino_lite.data.labeled import has_labels, labels_told
from dino_lite.data.parts import append_rows
from dino_lite.data.subset import Subset, spread
from dino_lite.eval.baselines import (
    KNN_KEYS,
    baseline_table,
    knn_against_baselines,
    measured_by_knn,
)
from dino_lite.eval.curves import read_curves
from dino_lite.eval.gallery import QUICK, draw_all
from dino_lite.eval.store import FeatureStore
from dino_lite.eval.verdict import loss_line, unreadable_line, verdict
from dino_lite.runs.run import Run
from dino_lite.wording import count

_NUM_DRAWN = 2000  # training images searched for neighbors

Say = Callable[[str], None]


def finish(run: Run, config: Config, splits: Splits, backbone: Backbone, say: Say) -> None:
    """Draw missing pictures, measure missing baselines, mark the run as finished, and say what came
    of it.

    If anything fails here, the run stays marked as trained, and the same command tries again; what
    was drawn or measured before is kept.
    """
    run.add_results(_facts(config, splits, run.results()))
    if splits.test is not None and not has_labels(splits.test):
        splits = splits._replace(test=None)
    size, workers = config["augment"]["global_size"], config["loader"]["num_workers"]
    data = CleanData(splits, preprocessing_of(size, instantiate(config["normalize"])), 256, workers)
    _draw(run, data, backbone, say)
    if config["baselines"] and has_labels(splits.train):
        _measure(run, data, backbone, int(config["seed"]), say)
    run.add_results({"finished": True})
    _say_verdict(run, say)


def _draw(run: Run, data: CleanData, backbone: Backbone, say: Say) -> None:
    files = {name: run.folder / f"{name}.png" for name in QUICK}
    missing = {name: draw for name, draw in QUICK.items() if not files[name].is_file()}
    if not missing:
        return
    train = data.splits.train
    few = Subset(train, spread(len(train), _NUM_DRAWN))
    say(f"drawing {', '.join(f'{name}.png' for name in missing)} from {len(few):,} images")
    drawn = CleanData(Splits(few, None, data.splits.name), data.preprocessing, 256)
    draw_all(backbone, FeatureStore(drawn), run.folder, missing, say)
    _note_unreadable(run, drawn)


def _measure(run: Run, data: CleanData, backbone: Backbone, seed: int, say: Say) -> None:
    """Measure what `run` lacks, and save each number when it is known."""
    known = measured_by_knn(run.results())
    left = [title for title in KNN_KEYS if title not in known]
    if not left:
        return
    num = len(data.splits.train) + len(data.splits.test or ())
    say(f"measuring k-NN on {num:,} images: {', '.join(left)}")
    try:
        for title, values in knn_against_baselines(backbone, data, seed, left):
            run.add_results(values)
            value = values[KNN_KEYS[title]]
            say(f"  {left.index(title) + 1} of {len(left)}, {title}: {value:.2f} %")
    except UserError as error:
        run.add_results({"knn_failed": str(error)})
    _note_unreadable(run, data)


def _note_unreadable(run: Run, data: CleanData) -> None:
    if data.bad:
        append_rows(run.bad_files, ("path", "reason"), [*data.bad.items()])


def _say_verdict(run: Run, say: Say) -> None:
    results, metrics = run.results(), run.folder / "metrics.csv"
    curves = read_curves(metrics) if metrics.is_file() else {}
    if len(measured_by_knn(results)) == len(KNN_KEYS):
        say(baseline_table(results))
    for line in (
        *verdict(results, curves, str(run.folder)),
        loss_line(curves),
        unreadable_line(len(run.unreadable())),
    ):
        if line:
            say(line)


def _facts(config: Config, splits: Splits, results: dict[str, Any]) -> dict[str, Any]:
    """What the verdict reads besides the numbers."""
    num_images = len(splits.train)
    begun = config.get("checkpoint") or config["backbone"].get("pretrained")
    facts = {
        "labels": labels_line(splits, config["data"].get("labels")),
        "num_classes": len(splits.train.classes) if has_labels(splits.train) else 0,
        "num_images": num_images,
        "baselines": bool(config["baselines"]),
    }
    if begun:
        facts["started_from"] = str(begun)
    if teacher := config.get("teacher"):
        facts["teacher"] = f"{teacher['checkpoint']} ({teacher['digest']})"
    if steps := results.get("steps"):
        facts["epochs"] = round(steps * config["loader"]["batch_size"] / num_images, 3)
    return facts


def labels_line(splits: Splits, how: str | None) -> str:
    """The number of classes and where they come from, or why there are none, without a full stop;
    `how` is data.labels, None if the source has no such key.
    """
    told = labels_told(splits)
    if not has_labels(splits.train):
        return f"no labels: {told}"
    off = "; data.labels=none if they mean nothing" if splits.labels_from and how == "auto" else ""
    return f"{count(len(splits.train.classes), 'class')}: {told}{off}"
