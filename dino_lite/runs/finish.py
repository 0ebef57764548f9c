"""Adds to a trained run its pictures, and its k-NN accuracy compared with the baselines."""

from __future__ import annotations

from collections.abc import Callable

from dino_lite.config import Config, instantiate
from dino_lite.contracts import Backbone, Splits
from dino_lite.data.clean import CleanData
from dino_lite.data.subset import Subset, spread
from dino_lite.eval.baselines import baseline_table, knn_against_baselines
from dino_lite.eval.gallery import QUICK, draw_all
from dino_lite.eval.store import FeatureStore
from dino_lite.runs.run import Run

_NUM_DRAWN = 2000  # training images searched for neighbors


def finish(
    run: Run, config: Config, splits: Splits, backbone: Backbone, say: Callable[[str], None]
) -> None:
    """Draw missing pictures, measure missing baselines, then mark the run as finished.

    If anything fails here, the run stays marked as trained, and the same command tries again.
    """
    if splits.test is not None and splits.test.labels is None:
        splits = splits._replace(test=None)
    size, workers = config["augment"]["global_size"], config["loader"]["num_workers"]
    data = CleanData(splits, size, instantiate(config["normalize"]), 256, workers)
    files = {name: run.folder / f"{name}.png" for name in QUICK}
    missing = {name: draw for name, draw in QUICK.items() if not files[name].is_file()}
    if missing:
        few = Subset(splits.train, spread(len(splits.train), _NUM_DRAWN))
        drawn = CleanData(Splits(few, None, splits.name), data.size, data.normalize, 256)
        draw_all(backbone, FeatureStore(drawn), run.folder, missing, say)
    measured = "knn_trained" in run.results()
    if config["baselines"] and splits.train.labels is not None and not measured:
        run.add_results(knn_against_baselines(backbone, data, int(config["seed"])))
        say(baseline_table(run.results()))
    run.add_results({"finished": True})
