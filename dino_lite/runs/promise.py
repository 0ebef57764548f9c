"""The promise of an adaptation: what was gained on MINE at what loss on what was known before.

The result lies on the line between the weights before and after training: the point that gains
most on images held out of MINE while no kept collection loses more than allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_lite.config import Config, load
from dino_lite.contracts import Backbone, Splits, Trust
from dino_lite.data.stage_data import identity
from dino_lite.eval.interpolation import ALPHAS, estimate_statistics, network_at
from dino_lite.eval.path_picture import path_picture
from dino_lite.eval.results import bootstrap
from dino_lite.eval.store import add_weights
from dino_lite.eval.tradeoff import Promise, change, choose
from dino_lite.formats.opened import Opened
from dino_lite.machine import pick_accelerator
from dino_lite.meter import named
from dino_lite.planning.checks import setting
from dino_lite.runs.begin import build_method
from dino_lite.runs.checkpoint import find_checkpoint, heads_in, open_backbone, save_backbone
from dino_lite.runs.finish import Say
from dino_lite.runs.judge import Judge, Judged
from dino_lite.runs.old_names import current
from dino_lite.runs.run import Run
from dino_lite.runs.settlement import sentences, table


def settle(
    run: Run,
    mine: Splits,
    keep: Mapping[str, Splits],
    promise: Promise,
    say: Say,
    trust: Trust = (),
) -> dict[str, Any]:
    """Measure the trained stage `run` along the line from its start to its end, choose, measure the
    choice on the test splits, write start.ckpt, adapted.ckpt, path.png and results.json, print a
    table. Returns what it adds to results.json, under "adaptation".

    `mine` and `keep` are whole collections, by name: what the stage did not train on follows from
    the seed of its data. Call it again after an interruption, or at any time: points that were
    measured are kept, and the result is the same. Only for the first rank. Raises UserError.
    """
    config = current(load(run.config_file))
    end = open_backbone(find_checkpoint(str(run.last), config["runs_dir"]), trust)
    start = open_start(run, config, trust)
    seed = int(setting(config, "data.seed", 0))
    key = _key(start, end, {"": mine} | dict(keep), promise, seed)
    before: dict[str, Any] = run.results().get("adaptation", {})
    if before.get("key") == key and run.adapted.is_file():
        say(table(before))
        return before
    workers = int(config["loader"]["num_workers"])
    judges = {
        name: Judge(splits, end.preprocessing, seed, promise.images, workers)
        for name, splits in ({"": mine} | dict(keep)).items()
    }
    device = torch.device(pick_accelerator(config["trainer"]["accelerator"], "accelerator"))
    line = Line(start, end.backbone, judges, device, seed, Outcomes(run.folder / "path.npz", key))
    found = _measured(line, promise, say) | {"key": key}
    found["held_out"] = bool(setting(config, "data.hold_out", False))
    found["sentences"] = sentences(found)
    if found["choice"]:
        points = {each["name"]: each["path"] for each in found["collections"]}
        path_picture(points, found["alpha"], found["max_loss"], run.path_picture)
    chosen = line.network(found["alpha"]).cpu()
    save_backbone(run.adapted, chosen, int(end.card["steps"]), heads_in(run))
    run.add_results({"adaptation": found})
    line.outcomes.file.unlink(missing_ok=True)
    say(table(found))
    return found


def open_start(run: Run, config: Config, trust: Trust = ()) -> Backbone:
    """The backbone with which the stage began, converted as it was; written to start.ckpt now if it
    is not there.
    """
    if not run.start.is_file():
        save_backbone(run.start, build_method(config).export_backbone().float(), 0)
    return open_backbone(find_checkpoint(str(run.start), config["runs_dir"]), trust).backbone


class Outcomes:
    """Scores of images by point and collection, in a file until the result stands."""

    def __init__(self, file: Path, key: str) -> None:
        self.file, self.key = file, key
        self.known: dict[str, np.ndarray] = {}
        try:
            with np.load(file) as stored:
                known = dict(stored)
            if known.pop("key").item() == key:
                self.known = known
        except (OSError, ValueError, KeyError, EOFError):  # none, damaged, or of other weights
            pass

    def add(self, scores: Mapping[str, Tensor]) -> None:
        """Store further scores, all in one file, atomically."""
        self.known |= {name: value.numpy() for name, value in scores.items()}
        part = self.file.with_suffix(".part")
        try:
            with part.open("wb") as file:
                np.savez(file, key=np.array(self.key), **self.known)  # type: ignore[arg-type]
            part.replace(self.file)
        except OSError:  # a full disk loses what could be resumed, no more
            part.unlink(missing_ok=True)


class Line:
    """The networks from start to end, their features and scores. Features are kept of the start and
    of those asked for by `keep_only`.
    """

    def __init__(
        self,
        start: Backbone,
        end: Backbone,
        judges: Mapping[str, Judge],
        device: torch.device,
        seed: int,
        outcomes: Outcomes,
    ) -> None:
        self.start, self.end, self.judges, self.device = start, end, judges, device
        self.seed, self.outcomes = seed, outcomes
        self._kept: dict[float, tuple[Backbone, dict[str, Judged]]] = {}

    def network(self, alpha: float) -> Backbone:
        """The network at a point."""
        if alpha in self._kept:
            return self._kept[alpha][0]
        network = network_at(self.start, self.end, alpha).to(self.device)
        if alpha not in (0, 1):
            estimate_statistics(network, self.judges[""].batches(network, self.seed))
        return network

    def features(self, alpha: float) -> tuple[Backbone, dict[str, Judged]]:
        """The network at a point and its features of each collection."""
        if alpha not in self._kept:
            network, found = self.network(alpha), {}
            for name, judge in self.judges.items():
                with named(f"alpha {alpha:g}, {judge.splits.name}"):
                    found[name] = judge.features(network)
            self._kept[alpha] = (network, found)
        return self._kept[alpha]

    def keep_only(self, *alphas: float) -> None:
        """Forget the features of other points."""
        self._kept = {alpha: kept for alpha, kept in self._kept.items() if alpha in alphas}

    def scores(self, alpha: float) -> dict[str, Tensor]:
        """Scores of the images held out of each collection, measured once."""
        known = self.outcomes.known
        if f"{alpha}" not in known:
            judged, of_start = self.features(alpha)[1], self.features(0.0)[1]
            found = {n: j.scores(judged[n], of_start[n]) for n, j in self.judges.items()}
            self.outcomes.add(
                {f"{alpha}": torch.ones(())} | {f"{alpha}/{n}": s for n, s in found.items()}
            )
        return {name: torch.from_numpy(known[f"{alpha}/{name}"]) for name in self.judges}

    def test_scores(self, alpha: float) -> dict[str, Tensor]:
        """Scores of the test images of each collection."""
        (network, judged), of_start = self.features(alpha), self.features(0.0)[1]
        return {
            name: judge.test_scores(network, judged[name], of_start[name])
            for name, judge in self.judges.items()
        }


def _measured(line: Line, promise: Promise, say: Say) -> dict[str, Any]:
    """The points, the choice among them, and the table of the tests, as plain JSON."""
    judges = line.judges
    labeled = [name for name, judge in judges.items() if name and judge.labeled]
    choice = judges[""].labeled
    max_loss = promise.limit(bool(labeled)) if choice else None
    alphas = ALPHAS if choice else (0.0, 1.0)
    say(
        f"measuring {', '.join(judge.splits.name for judge in judges.values())} "
        + (f"at {len(alphas)} points from start to end" if choice else "at start and end")
    )
    scores: dict[float, dict[str, Tensor]] = {}
    alpha = 1.0
    for at in alphas:
        scores[at] = line.scores(at)
        if choice:
            alpha = _chosen(scores, labeled, max_loss)
        line.keep_only(0.0, alpha, 1.0)
        changes = [
            f"{judges[name].splits.name} {change(scores[0.0][name], scores[at][name]).value:+.2f}"
            for name in judges
        ]
        say(f"  alpha {at:g}: {', '.join(changes)}")
    columns = {"start": 0.0, "adapted": alpha, "end": 1.0}
    tested = {at: line.test_scores(at) for at in sorted(set(columns.values()))}
    titles = _titles(judges)
    return {
        "alpha": alpha,
        "choice": choice,
        "max_loss": max_loss,
        "collections": [
            {
                "name": titles[name],
                "kept": bool(name),
                "identity": identity(judge.splits.train),
                "labeled": judge.labeled,
                "metric": judge.metric,
                "num_bank": len(judge.bank),
                "path": [
                    {"alpha": at} | _entry(scores[0.0][name], scores[at][name]) for at in alphas
                ],
                "images": judge.judged_on,
                "tested": judge.test is not None,
                **{
                    title: _entry(tested[0.0][name], tested[at][name])
                    for title, at in columns.items()
                },
            }
            for name, judge in judges.items()
        ],
    }


def _chosen(
    scores: Mapping[float, Mapping[str, Tensor]], labeled: list[str], max_loss: float | None
) -> float:
    """Alpha of the best of the points so far, the first of which is the start."""
    means = [{name: float(each.mean()) for name, each in at.items()} for at in scores.values()]
    gains = [at[""] - means[0][""] for at in means]
    losses = [[means[0][name] - at[name] for at in means] for name in labeled]
    return [*scores][choose(gains, losses, max_loss)]


def _entry(before: Tensor, after: Tensor) -> dict[str, Any]:
    """A network's mean score and its change from the start, each with its interval."""
    changed = change(before, after)
    return {
        "value": float(after.mean()),
        "interval": [*bootstrap(after)],
        "change": changed.value,
        "change_interval": [changed.low, changed.high],
        "num": changed.num,
    }


def _titles(judges: Mapping[str, Judge]) -> dict[str, str]:
    """The collections' names; those of equal names also have their key."""
    names = [judge.splits.name for judge in judges.values()]
    return {
        key: name if names.count(name) == 1 else f"{name} ({key or 'data'})"
        for key, name in zip(judges, names, strict=True)
    }


def _key(
    start: Backbone, end: Opened, collections: Mapping[str, Splits], promise: Promise, seed: int
) -> str:
    """32 hex digits over everything that the result depends on."""
    total = blake2b(digest_size=16)
    parts = [
        f"{name} {identity(source)} {len(source)}"
        for name, splits in collections.items()
        for source in (splits.train, splits.test)
        if source is not None
    ]
    total.update(repr([parts, promise, seed, end.preprocessing]).encode())
    for backbone in (start, end.backbone):
        add_weights(total, backbone)
    return total.hexdigest()
