"""The promise: what is chosen on planted networks, and what a trained stage leaves on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino_lite.config import load, put
from dino_lite.contracts import Backbone, Source, Splits, Tokens, UserError
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import ArraySource
from dino_lite.eval.interpolation import between
from dino_lite.eval.tradeoff import Promise
from dino_lite.planning.plan import open_splits
from dino_lite.runs import judge as judges_module
from dino_lite.runs.begin import build_method
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.judge import Judge
from dino_lite.runs.pretraining import run_pretrain
from dino_lite.runs.promise import Line, Outcomes, _measured, settle
from dino_lite.runs.run import Run
from dino_lite.runs.settlement import sentences, table
from test_interpolation import convnet, same
from tiny import photos, tiny

HOW = Preprocessing((4, 4), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CPU = torch.device("cpu")


class Planted(Backbone):
    """The class token is the mean of each channel times a weight."""

    num_blocks, patch_size, in_chans, embed_dim = 1, 4, 3, 3

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))
        self.spec = {}

    def forward(self, images: Tensor, mask: Tensor | None = None, cls_only: bool = False) -> Tokens:
        means = images.mean(dim=(2, 3)) * self.weights
        return Tokens(means, means[:, None], None, (1, 1))


# Training turned the network from the second channel to the first.
START, END = (0.0, 1.0, 0.5), (1.0, 0.0, 0.5)


def told_by(
    channel: int, num: int, seed: int, labeled: bool = True, noise: float = 2
) -> ArraySource:
    """Images whose class is the brightness of a channel; the other is noise, the third constant."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 2
    pixels = np.full((num, 4, 4, 3), 128.0)
    pixels[..., :2] = rng.uniform(0, 255, (num, 1, 1, 2))
    pixels[..., channel] = (124 + 8 * labels + rng.normal(0, noise, num))[:, None, None]
    images = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))
    return ArraySource(
        images, labels if labeled else None, ["dark", "bright"], f"told by {channel}"
    )


def collection(channel: int, name: str, labeled: bool = True, test: int = 200) -> Splits:
    whole = told_by(channel, 600, channel, labeled)
    return Splits(whole, told_by(channel, test, 9 + channel, labeled) if test else None, name)


JUDGES: dict[int, Judge] = {}  # by the train split, which each of them keeps alive


def judge_of(splits: Splits) -> Judge:
    """Its images read once, and the test split as given."""
    known = JUDGES.get(id(splits.train))
    if known is None or known.splits is not splits:
        known = JUDGES[id(splits.train)] = Judge(splits, HOW, 0, 1000)
    return known


def measured(
    mine: Splits,
    keep: Mapping[str, Splits],
    promise: Promise = Promise(),  # noqa: B008 - not changed
    start: Backbone | None = None,
    end: Backbone | None = None,
) -> dict[str, Any]:
    """What is found on the line between two planted networks."""
    judges = {name: judge_of(splits) for name, splits in ({"": mine} | dict(keep)).items()}
    outcomes = Outcomes(Path("/nowhere/path.npz"), "")
    usual = (mine, keep, start, end) == (MINE, {"old": OLD}, None, None)
    outcomes.known = KNOWN if usual else {}
    line = Line(start or Planted(*START), end or Planted(*END), judges, CPU, 0, outcomes)
    found = _measured(line, promise, lambda _: None) | {"held_out": True}
    KNOWN.update(outcomes.known if usual else {})
    return found | {"sentences": sentences(found)}


KNOWN: dict[str, Any] = {}  # the scores of what most tests measure
MINE, OLD = collection(0, "mine"), collection(1, "old")


def changes(found: dict[str, Any], which: int) -> list[float]:
    return [each["change"] for each in found["collections"][which]["path"]]


# ------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("max_loss", [2.0, 10.0, None])
def test_the_point_that_gains_most_within_the_limit_is_chosen(max_loss: float | None) -> None:
    """On images held out of train; less is gained where less may be lost."""
    found = measured(MINE, {"old": OLD}, Promise(max_loss))
    gains, losses = changes(found, 0), [-change for change in changes(found, 1)]
    assert gains[0] == losses[0] == 0
    assert max(gains) > 10
    assert losses[-1] > 10
    allowed = [i for i in range(11) if max_loss is None or losses[i] <= max_loss]
    best = max(gains[i] for i in allowed)
    assert found["alpha"] == min(i for i in allowed if gains[i] == best) / 10
    assert found["alpha"] == {2.0: 0.3, 10.0: 0.7, None: 0.8}[max_loss]
    assert found["collections"][0]["path"][0]["num"] == 60
    told = " ".join(found["sentences"])
    assert f"Alpha {found['alpha']:g} gains most on mine" in told
    assert ("where old loses at most" in told) == (max_loss is not None)


def test_test_images_choose_nothing() -> None:
    """With other test labels the table differs, and the choice does not."""
    found = measured(MINE, {"old": OLD})
    assert MINE.test is not None
    other = told_by(0, 200, 9)
    other.labels = 1 - np.asarray(other.labels)
    changed = measured(MINE._replace(test=other), {"old": OLD})
    assert changed["alpha"] == found["alpha"]
    first, second = (each["collections"][0] for each in (found, changed))
    assert first["path"] == second["path"]
    assert first["adapted"] != second["adapted"]


def test_tests_are_looked_at_once_and_after_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """By start, result and end, after the last of the images by which was chosen."""
    seen: list[tuple[str, float]] = []
    extract = judges_module.extract

    def watched(network: Any, data: Any, source: Source, *rest: Any) -> Any:
        what = {60: "held", 540: "bank", 200: "test"}[len(source)]
        seen.append((what, round(float(network.weights[0].detach()), 4)))
        return extract(network, data, source, *rest)

    monkeypatch.setattr(judges_module, "extract", watched)
    monkeypatch.setitem(globals(), "KNOWN", {})
    found = measured(MINE, {"old": OLD}, Promise(10.0))
    assert 0 < found["alpha"] < 1
    tests = [number for number, (what, _) in enumerate(seen) if what == "test"]
    assert tests == list(range(44, 50))  # twice 11 points of 2 parts before, each part once
    assert len({weight for _, weight in seen[44:]}) == 3
    assert len(set(seen[:44])) == 22


def test_a_gain_that_chance_explains_is_none() -> None:
    """Start and end differ by nothing that matters; the sentence says so."""
    found = measured(MINE, {}, start=Planted(0.0, 1.0, 0.5), end=Planted(0.0, 0.9, 0.5))
    best = max(found["collections"][0]["path"], key=lambda each: each["change"])
    assert best["change_interval"][0] <= 0
    assert found["sentences"][0].startswith("Nothing gained on mine")
    assert "Nothing gained" not in " ".join(measured(MINE, {})["sentences"])


def test_it_is_said_how_many_images_would_resolve_the_limit() -> None:
    """60 held-out images tell no loss of a point; a wide limit they do."""
    narrow = measured(MINE, {"old": OLD}, Promise(1.0))["sentences"]
    assert any("too few for adapt.max_loss=1, for which about" in each for each in narrow)
    wide = measured(MINE, {"old": OLD}, Promise(60.0))["sentences"]
    assert any(each.endswith("enough for adapt.max_loss=60.") for each in wide)


def test_what_tests_lose_beyond_the_limit_is_said() -> None:
    """The promise was made on other images."""
    old = OLD._replace(test=told_by(1, 200, 5, noise=1))
    assert old.test is not None
    found = measured(MINE, {"old": old}, Promise(12.0))
    found["collections"][1]["adapted"]["change"] = -12.5
    assert any("On its test images, old loses 12.50 points" in each for each in sentences(found))


@pytest.mark.parametrize("labeled", [True, False])
def test_without_labels_of_mine_nothing_is_chosen(labeled: bool) -> None:
    """The end is the result, which is said; neighbors of the start are its own."""
    keep = {"old": OLD} if labeled else {}
    found = measured(collection(0, "mine", labeled=False), keep)
    assert (found["alpha"], found["choice"], found["max_loss"]) == (1.0, False, None)
    assert found["sentences"][0] == (
        "No choice was made, as mine has no labels to measure a gain by: "
        "adapted.ckpt is the end of training."
    )
    mine = found["collections"][0]
    assert mine["metric"] == "agreement of 20 neighbors with the start"
    assert mine["start"]["value"] == 100
    assert 0 < mine["end"]["value"] < 60
    assert mine["adapted"] == mine["end"]
    if labeled:
        assert found["collections"][1]["metric"] == "k-NN top-1 (k=20)"
        assert found["collections"][1]["end"]["num"] == 200


def test_a_kept_collection_without_labels_limits_nothing() -> None:
    """Its agreement is measured at every point; a limit that is asked for is refused."""
    keep = {"old": collection(1, "old", labeled=False)}
    found = measured(MINE, keep)
    assert found["max_loss"] is None
    agreements = [each["value"] for each in found["collections"][1]["path"]]
    assert agreements[0] == 100
    assert agreements == sorted(agreements, reverse=True)
    with pytest.raises(UserError, match=r"adapt\.max_loss=1 limits"):
        measured(MINE, keep, Promise(1.0))


def test_without_test_labels_the_table_is_of_the_held_out_images() -> None:
    """Which is said, as they have chosen."""
    found = measured(collection(0, "mine", test=0), {})
    mine = found["collections"][0]
    assert mine["images"] == "images held out of train"
    assert mine["adapted"]["value"] == mine["path"][round(10 * found["alpha"])]["value"]
    assert any("has no labeled test images" in each for each in found["sentences"])


def test_every_kept_collection_counts_and_equal_names_are_told_apart() -> None:
    """The limit holds for each; titles have their keys."""
    second = Splits(told_by(1, 600, 77), None, "old")
    found = measured(MINE, {"first": OLD, "second": second}, Promise(5.0))
    at = round(10 * found["alpha"])
    assert all(-changes(found, which)[at] <= 5 for which in (1, 2))
    names = [each["name"] for each in found["collections"]]
    assert names == ["mine", "old (first)", "old (second)"]
    told = table(found)
    assert all(name in told for name in names)
    assert f"adapted (alpha {found['alpha']:g})" in told


def test_few_images_are_measured_where_few_are_asked_for() -> None:
    """A tenth of them held out, of all classes."""
    judge = Judge(MINE, HOW, 0, 100)
    assert (len(judge.bank), len(judge.held)) == (90, 10)
    assert set(np.asarray(judge.held.labels).tolist()) == {0, 1}


def test_statistics_are_estimated_between_start_and_end_only() -> None:
    """By the bank's images; the ends are what they are."""
    start, end = convnet(1), convnet(2)
    line = Line(start, end, {"": Judge(MINE, HOW, 0, 100)}, CPU, 0, Outcomes(Path("/no/p"), ""))
    for alpha, network in ((0.0, start), (1.0, end)):
        assert same(line.network(alpha).state_dict(), network.state_dict())
    middle, plain = line.network(0.5), between(start.state_dict(), end.state_dict(), 0.5)
    differ = {n for n, v in middle.state_dict().items() if not torch.equal(v, plain[n])}
    assert {name.rpartition(".")[2] for name in differ} == {"running_mean", "running_var"}
    again = line.network(0.5).state_dict()
    assert same(middle.state_dict(), again)


# ----------------------------------------------------------------------------------------- on disk


SHAPES = {"_target_": "dino_lite.data.shapes.open_shapes", "num_train": 80, "num_test": 30}
STAGE = {
    "_target_": "dino_lite.data.stage_data.open_stage_data",
    "data": SHAPES | {"seed": 3},
    "keep": {"old": SHAPES},
    "share": 0.2,
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained stage on shapes that replays other shapes; tests settle it."""
    folder = tmp_path_factory.mktemp("runs")
    config = put(tiny(folder, "name=01_adapt", "optim.rate=0.02"), "data", STAGE)
    return Path(run_pretrain(config)["run"])


def collections() -> tuple[Splits, Splits]:
    return open_splits(STAGE["data"]), open_splits(SHAPES)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_stage_is_settled_and_again_after_any_interruption(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted call keeps the points that it measured; the result is the same, and a further
    call changes nothing.
    """
    run, (mine, old), said = Run(stage), collections(), list[str]()

    def stop(text: str) -> None:
        if "alpha 0.3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settle(run, mine, {"old": old}, Promise(None), stop)
    assert not run.adapted.exists()
    assert "adaptation" not in run.results()
    networks: list[int] = []
    extract = judges_module.extract

    def counted(*given: Any) -> Any:
        networks.append(id(given[0]))
        return extract(*given)

    monkeypatch.setattr(judges_module, "extract", counted)
    found = settle(run, mine, {"old": old}, Promise(None), said.append)
    measured_again = len(networks)
    assert measured_again < 2 * 2 * 11
    assert run.results()["adaptation"] == found == json.loads(json.dumps(found))
    assert settle(run, mine, {"old": old}, Promise(None), said.append) == found
    assert len(networks) == measured_again
    assert said[-1] == table(found)
    assert said[-1].endswith("\n".join(found["sentences"]))
    assert not (stage / "path.npz").exists()
    assert run.path_picture.stat().st_size > 5000
    # Not interrupted: the same.
    run.results_file.unlink()
    assert settle(run, mine, {"old": old}, Promise(None), said.append) == found
    # The start is the network as built at step 0, the result lies on the line; each is opened by
    # its path, with the whole collection as its data.
    opened = {
        name: open_backbone(find_checkpoint(str(run.checkpoints / f"{name}.ckpt"), "runs"))
        for name in ("start", "adapted", "last")
    }
    weights = {name: each.backbone.state_dict() for name, each in opened.items()}
    built = build_method(load(run.config_file)).export_backbone()
    assert same(weights["start"], built.state_dict())
    assert not same(weights["start"], weights["last"])
    wanted = between(weights["start"], weights["last"], found["alpha"])
    assert same(weights["adapted"], wanted)
    assert [each.card["steps"] for each in opened.values()] == [0, 8, 8]
    assert opened["adapted"].data == STAGE["data"]


def test_another_training_in_the_folder_forgets_the_result(tmp_path: Path) -> None:
    """Its start would be another's."""
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    files = (run.start, run.adapted, run.path_picture, run.results_file)
    for file in files:
        file.touch()
    run.clear([])
    assert not any(file.exists() for file in files)


def test_a_kept_folder_of_other_sizes_without_labels(stage: Path, tmp_path: Path) -> None:
    """Photographs of 40 x 30 pixels, one of which cannot be read; each is resized as the network
    expects.
    """
    old = photos(tmp_path / "old", [f"{i}.png" for i in range(30)])
    (old / "7.png").write_bytes(b"no image")
    node = {"_target_": "dino_lite.data.auto.open_auto", "root": str(old)}
    found = settle(
        Run(stage), collections()[0], {"old": open_splits(node)}, Promise(), lambda _: None
    )
    assert found["max_loss"] is None
    kept = found["collections"][1]
    assert kept["start"]["value"] == 100
    assert kept["num_bank"] + kept["start"]["num"] in (29, 30)
