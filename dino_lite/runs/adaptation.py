"""The stages of an adaptation: collections one after another, each from the former result."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dino_lite.config import Config, config_dir, get, load, put
from dino_lite.contracts import Splits, UserError
from dino_lite.data.roots import several
from dino_lite.data.stage_data import check_collections, halves, identity
from dino_lite.distributed import rank
from dino_lite.eval.history import History
from dino_lite.eval.history_picture import history_picture, history_table
from dino_lite.eval.tradeoff import Promise
from dino_lite.formats.opened import Opened
from dino_lite.formats.safetensors import SafeTensors
from dino_lite.machine import pick_accelerator
from dino_lite.planning.plan import open_splits
from dino_lite.runs.checkpoint import Checkpoint, find_checkpoint, open_backbone, read_checkpoint
from dino_lite.runs.judge import Judge
from dino_lite.runs.old_names import current
from dino_lite.runs.pretraining import say
from dino_lite.runs.promise import open_start, settle
from dino_lite.runs.run import Run
from dino_lite.runs.sequence import Sequence, Stage
from dino_lite.runs.sequence_folder import title_of

RESULT = "checkpoints/adapted.ckpt"
_OWN = ("keep", "stages", "adapt")  # keys that pretrain does not have


class Collection(NamedTuple):
    """Images: the key that names them, their configuration, and what that opens."""

    key: str
    node: Config
    splits: Splits


class Adaptation:
    """What `dino-lite adapt` is asked for, opened and checked. `config` is checked and has the
    resolved path of `checkpoint`. Raises UserError.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.trust = config, config.get("trust") or ()
        self.start = find_checkpoint(config["checkpoint"], config["runs_dir"])
        self.opened: Opened = open_backbone(self.start, self.trust)
        self.promise, self.share = Promise(**config["adapt"]), float(config["keep"]["share"])
        self.new = [self._open(key, node) for key, node in collections(config)]
        old = {key: value for key, value in config["keep"].items() if key != "share"}
        named = old.get("root") is not None or not str(old["_target_"]).endswith(".open_auto")
        self.old = [self._open("keep.root", old)] if named else []
        self._check()

    def _open(self, key: str, node: Config) -> Collection:
        if node.get("channels") == 3:  # the default
            node = node | {"channels": self.opened.backbone.in_chans}
        return Collection(key, node, open_splits(node))

    def _check(self) -> None:
        first, *rest = [*self.new, *self.old]
        check_collections(first.splits, {each.key: each.splits for each in rest}, first.key)
        kept = [*self.old, *self.new[:-1]]
        if self.share and not kept:
            raise UserError(
                f"keep.share={self.share:g}: there is nothing to replay; name the images to be "
                "kept by keep.root=, or leave it out."
            )
        if given := self.config["backbone"].get("pretrained"):
            raise UserError(
                f"backbone.pretrained={given}: the weights to start from are those of checkpoint=: "
                "leave one out."
            )
        seed = int(self.config["seed"])
        self.promise.limit(any(halves(each.splits.train, seed) for each in kept))

    def kept(self, stage: int) -> list[Collection]:
        """The collections that a stage, counted from 0, holds on to."""
        return [*self.old, *self.new[:stage]]

    def stages(self, sequence: Sequence) -> list[Stage]:
        """The stages, in order."""
        weights = self._start_file(sequence.folder)
        heads = self.start.run is not None and _has_heads(self.start, self.config)
        found: list[Stage] = []
        for i in range(len(self.new)):
            name = f"{i + 1:02d}_adapt"
            config = self._stage_config(i, weights, heads and i == 0)
            student = _title(self.start) if i == 0 else found[-1].name
            after = functools.partial(self._after, sequence, i)
            found.append(Stage(name, config, student, student, RESULT, after, self._before))
            weights = sequence.result_of(name, RESULT)
        return found

    def _stage_config(self, stage: int, weights: str, heads: bool) -> Config:
        config = {key: value for key, value in self.config.items() if key not in _OWN}
        how = self.opened.preprocessing
        patch = self.opened.backbone.patch_size
        told = {
            "augment.global_size": max(patch, min(how.size) // patch * patch),
            "normalize.mean": list(how.mean),
            "normalize.std": list(how.std),
        }
        for key, value in told.items():
            if get(config, key) == "auto":
                config = put(config, key, value)
        replayed = self.kept(stage) if self.share else []
        data = {
            "_target_": "dino_lite.data.stage_data.open_stage_data",
            "data": self.new[stage].node,
            "keep": dict(zip(_unique(replayed), (each.node for each in replayed), strict=True)),
            "share": self.share if replayed else 0.0,
            "seed": int(config["seed"]),
        }
        start = {"checkpoint": weights if heads else None}
        pretrained = None if heads else weights
        kinds = [load(config_dir() / "backbone" / f"{name}.yaml") for name in ("auto", "rope")]
        chosen = config["backbone"]  # if a method's usual one: the file's
        backbone = (kinds[0] if chosen in kinds else chosen) | {"pretrained": pretrained}
        teacher = {"teacher": {"checkpoint": weights}}
        return config | start | teacher | {"data": data, "backbone": backbone}

    def _start_file(self, folder: Path) -> str:
        """The path of the weights to start from; those of timm's are written to one."""
        if self.start.path is not None:
            return str(self.config["checkpoint"])
        file = folder / "start"
        if rank() == 0 and not (file / "model.safetensors").is_file():
            file.mkdir(parents=True, exist_ok=True)
            SafeTensors().write(self.opened, file)
        return str(file.absolute())

    def _before(self, run: Run, config: Config) -> None:
        """Write the backbone that a stage begins with: its file may change later."""
        open_start(run, config, self.trust)

    def _after(self, sequence: Sequence, stage: int, run: Run) -> dict[str, Any]:
        """Choose the result of a trained stage; with several collections, measure it on all."""
        kept = {each.key: each.splits for each in self.kept(stage)}
        labeled = any(halves(each.train, int(self.config["seed"])) for each in kept.values())
        promise = self.promise if labeled else self.promise._replace(max_loss="auto")
        found = settle(run, self.new[stage].splits, kept, promise, say, self.trust)
        told = {key: found[key] for key in ("alpha", "choice", "max_loss", "collections")}
        told |= {"sentences": found["sentences"]}
        if len(self.new) == 1:
            return told
        networks = {"start": run.start, "adapted": run.adapted}
        rows = [
            self._row(run, file, found["collections"], which)
            for which, file in networks.items()
            if stage == 0 or which == "adapted"
        ]
        before = [row for each in sequence.at.finished() for row in each["results"]["accuracy"]]
        return told | {
            "accuracy": rows,
            "history": self._history(sequence.folder, [*before, *rows]),
        }

    def _history(self, folder: Path, rows: list[dict[str, float]]) -> dict[str, Any]:
        """Draw and print the matrix whose `rows` are accuracies by identity."""
        every = [*self.old, *self.new]
        keys = [identity(each.splits.train) for each in every]
        learned = [0] * len(self.old) + [i + 1 for i in range(len(self.new))]
        history = History([[row.get(key) for key in keys] for row in rows], learned)
        names = _unique(every)
        titles = ["start", *(f"after {names[len(self.old) + i]}" for i in range(history.last))]
        if any(rows):  # of labeled collections
            say(history_table(history, titles, names))
            history_picture(history, titles, names, folder / "matrix.png")
        matrix = {"collections": names, "rows": titles, "accuracy": history.accuracy}
        return matrix | history.summary()

    def _row(
        self, run: Run, file: Path, known: list[dict[str, Any]], which: str
    ) -> dict[str, float]:
        """k-NN accuracy of a network of a stage on each labeled collection, by its identity, with
        those `known` already.
        """
        row = {each["identity"]: each[which]["value"] for each in known if each["labeled"]}
        seen = {each["identity"] for each in known}
        opened = open_backbone(find_checkpoint(str(file), run.folder.parent), self.trust)
        trainer = load(run.config_file)["trainer"]
        device = torch.device(pick_accelerator(trainer["accelerator"], "accelerator"))
        network, seed = opened.backbone.to(device), int(self.config["seed"])
        workers = int(load(run.config_file)["loader"]["num_workers"])
        for each in [*self.old, *self.new]:
            key = identity(each.splits.train)
            if key in seen or halves(each.splits.train, seed) is None:
                continue
            judge = Judge(each.splits, opened.preprocessing, seed, self.promise.images, workers)
            judged = judge.features(network)
            row[key] = float(judge.test_scores(network, judged, judged).mean())
        return row


def collections(config: Config) -> list[tuple[str, Config]]:
    """The data configuration of each stage, with the key that names it."""
    asked = config.get("stages")
    if not asked:
        return [("data.root", config["data"])]
    if config["data"].get("root") is not None:
        raise UserError("data.root= and stages= both name images: leave one out.")
    found = []
    for i, root in enumerate(several(asked) or [asked]):
        choice = config_dir() / "data" / f"{root}.yaml"
        named = not Path(str(root)).exists() and choice.is_file()
        node = load(choice) if named else config["data"] | {"root": str(root)}
        found.append((f"stages[{i}]", node))
    return found


def _has_heads(start: Checkpoint, config: Config) -> bool:
    """Whether `start` is a checkpoint of a run of the same method, with its heads."""
    assert start.run is not None
    assert start.path is not None
    saved = current(load(start.run.config_file))
    if "spec" in read_checkpoint(start.path):  # a backbone alone
        return False
    if saved["method"]["_target_"] == config["method"]["_target_"]:
        return True
    method = saved.get("choices", {}).get("method")
    again = f": method={method} would go on with its heads" if method else ""
    say(f"{_title(start)} is a run of another method, so only its backbone is used{again}.\n")
    return False


def _title(start: Checkpoint) -> str:
    """What the start is called in the table."""
    return start.title if start.run is None else title_of(start.run)


def _unique(collections: list[Collection]) -> list[str]:
    """The names of collections, with numbers where some are equal."""
    names = [each.splits.name.replace(".", "_") for each in collections]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]
