"""Generations without labels: pretrain generations=n, and how they are compared."""

from __future__ import annotations

import csv
import importlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_lite.callbacks.online_eval import OnlineEval
from dino_lite.commands.pretrain import pretrain
from dino_lite.config import Config, compose, load, put
from dino_lite.contracts import UserError
from dino_lite.data.sources import ArraySource
from dino_lite.draws import derived_seed
from dino_lite.eval.features import Features
from dino_lite.eval.knn import KNN, knn_predict
from dino_lite.eval.lineage import compare_generations
from dino_lite.eval.neighbors import unit
from dino_lite.planning.checks import check_values
from dino_lite.planning.plan import open_splits
from dino_lite.report.doubts import doubts
from dino_lite.report.story import read_story
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.generations import _architecture, _learning, run_generations
from dino_lite.runs.run import read_json
from dino_lite.runs.sequence import Sequence
from pooled import shades, small_vit, store_of
from tiny import tiny, train

ROOT = Path(__file__).resolve().parents[1]


def noisy(num: int, seed: int, labels: bool = True) -> ArraySource:
    """Shades whose labels are partly wrong, so that predictions differ."""
    source = shades(num, labels=[(i + (i % 5 == 0)) % 3 for i in range(num)], seed=seed)
    if not labels:
        source.labels = None
    return source


def test_generations_are_compared_as_the_evaluation_does() -> None:
    """Accuracies are those of k-NN, agreement that of its predictions, and the ensemble is k-NN of
    unit features side by side.
    """
    train, test = noisy(60, 0), noisy(30, 1)
    store, networks = store_of(train, test), [small_vit() for _ in range(3)]
    found = compare_generations(networks, store)
    assert json.loads(json.dumps(found)) == found
    knn = KNN(ks=[20])
    for network, row in zip(networks, found["generations"], strict=True):
        expected = knn(network, store)
        assert row["test"]["top1"] == expected["value"]
        assert row["test"]["interval"] == expected["interval"]
        alone = knn.score(store.pooled(network, train).features(), None)
        assert row["train"]["top1"] == alone["value"]
    assert found["value"] == found["generations"][-1]["test"]["top1"]
    sides = [[store.pooled(each, split).features() for each in networks] for split in (train, test)]
    banks, asked = sides
    said = [knn_predict(asked[i], banks[i], 20) for i in range(3)]
    for i in (1, 2):
        same = float((said[i] == said[i - 1]).double().mean())
        assert found["generations"][i]["agreement"] == pytest.approx(100 * same)
    assert found["generations"][0]["agreement"] is None
    bank, queries = (
        Features(torch.cat([unit(x.features) for x in side], dim=1), side[0].labels)
        for side in sides
    )
    assert found["ensemble"]["test"]["top1"] == knn.score(bank, queries)["value"]
    assert [row["generation"] for row in found["table"]] == ["1", "2", "3", "ensemble"]


def test_without_labels_agreement_is_that_of_neighbors() -> None:
    """Against plain loops; nothing else can be measured."""
    source = noisy(25, 0, labels=False)
    store, networks = store_of(source), [small_vit(), small_vit()]
    found = compare_generations(networks, store)
    nearest = []
    for network in networks:
        rows = unit(store.pooled(network, source).features().features)
        each = []
        for i in range(25):
            others = sorted(
                (j for j in range(25) if j != i), key=lambda j: -float(rows[i] @ rows[j])
            )
            each.append(set(others[:20]))
        nearest.append(each)
    common = [len(a & b) / 20 for a, b in zip(*nearest, strict=True)]
    assert found["value"] == pytest.approx(100 * sum(common) / 25)
    assert found["ensemble"] is None
    assert found["table"][0] == {"generation": "1", "agreement with its teacher %": ""}


def asked(runs_dir: Path) -> Config:
    """The configuration of three tiny generations."""
    return tiny(runs_dir, "generations=3", "name=born", "trainer.max_steps=4")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three generations of four steps."""
    folder = tmp_path_factory.mktemp("generations")
    return Path(run_generations(asked(folder))["run"])


def test_each_generation_is_new_and_learns_from_the_one_before(three: Path) -> None:
    """Of the same architecture and length, with other weights; the name opens the last one."""
    folders = [three / "01_pretrain", *(three / f"0{i}_generation" / "student" for i in (2, 3))]
    opened = [open_backbone(find_checkpoint(str(folder), "runs")) for folder in folders]
    assert len({json.dumps(each.backbone.stored_spec()) for each in opened}) == 1
    assert len({each.preprocessing for each in opened}) == 1
    assert [read_json(folder / "results.json")["steps"] for folder in folders] == [4, 4, 4]
    for before, folder in pairwise(folders):
        assert load(folder / "config.yaml")["teacher"]["checkpoint"] == str(before)
    assert len({load(folder / "config.yaml")["seed"] for folder in folders}) == 3
    found = find_checkpoint(str(three), "runs").path
    assert found == folders[-1] / "checkpoints" / "last.ckpt"
    (row,) = {load(folder.parent / "config.yaml")["method"]["_target_"] for folder in folders[1:]}
    assert row.endswith(".Distillation")


def test_generations_are_compared_after_each_and_told(three: Path) -> None:
    """In results.json of each, in sequence.json, and agreement with the frozen teacher during
    training.
    """
    stages = read_json(three / "sequence.json")["stages"]
    for num, stage in ((2, "02_generation"), (3, "03_generation")):
        found = read_json(three / stage / "student" / "results.json")["last"]["generations"]
        assert len(found["generations"]) == num
        assert found["num_test"] == 20
        (kept,) = [each["results"] for each in stages if each["name"] == stage]
        assert kept["generations"] == found
        with open(three / stage / "metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["student/knn_agreement"]]
        assert rows
        assert all(0 <= float(row["student/knn_agreement"]) <= 100 for row in rows)


def test_the_first_generation_is_the_ordinary_run(three: Path, tmp_path: Path) -> None:
    """Bit for bit; and one generation is today's command, whose run has today's name."""
    alone = train(tmp_path, "name=alone", "trainer.max_steps=4")
    pair = [
        open_backbone(find_checkpoint(str(folder), "runs")).backbone.state_dict()
        for folder in (alone, three / "01_pretrain")
    ]
    assert all(torch.equal(value, pair[1][name]) for name, value in pair[0].items())
    assert compose("pretrain", [])["generations"] == 1


def test_finished_generations_are_not_trained_again(
    three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command says so; another number of generations is refused under this name."""
    config = asked(three.parent)
    before = (three / "03_generation/checkpoints/last.ckpt").stat().st_mtime_ns
    run_generations(config)
    assert "is finished" in capsys.readouterr().out
    assert (three / "03_generation/checkpoints/last.ckpt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="generations"):
        run_generations(put(config, "generations", 2))


def test_the_architecture_is_the_same_before_and_after_the_first_stage(
    three: Path, tmp_path: Path
) -> None:
    """As planned, and as the run has it: else an interrupted sequence could not go on."""
    nodes = []
    for folder in (tmp_path, three.parent):
        config = asked(folder)
        first = check_values(put(config, "generations", 1))
        splits = open_splits(first["data"])
        nodes.append(_architecture(Sequence("pretrain", config, splits.name), first, splits))
    assert nodes[0] == nodes[1]


def test_a_generation_has_seeds_of_its_own_but_the_same_images() -> None:
    """Crops, weights and masks differ; data does not."""
    first = compose("pretrain", ["data=shapes", "seed=3", "data.seed=3"])
    own = _learning(first, 2)
    seed = derived_seed(3, 2)
    assert own["seed"] == own["augment"]["seed"] == own["method"]["masking"]["seed"] == seed
    assert own["data"] == first["data"]
    assert derived_seed(3, 1) == 3
    assert len({derived_seed(3, i) for i in range(1, 50)}) == 49


def test_only_pretrain_trains_generations() -> None:
    """Other commands that have its keys refuse; so does a number below one."""
    with pytest.raises(UserError, match=r"generations=2.*dino-lite pretrain"):
        check_values(compose("distill", ["generations=2"]))
    with pytest.raises(UserError, match="generations=0"):
        pretrain("data=shapes", "generations=0")


def online(knn: list[float], agreement: list[float], num: int = 2000) -> list[dict[str, Any]]:
    """The warnings after such evaluations during a distillation."""
    callback = OnlineEval()
    callback._taught = torch.zeros(num, dtype=torch.long)
    for i, (value, agreed) in enumerate(zip(knn, agreement, strict=True), 1):
        callback._watch("small", 100 * i, {"knn": value, "knn_agreement": agreed})
    return callback.warnings


def test_a_student_that_copies_mistakes_during_training_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once, compared with its best evaluation; not where both rise, nor of noise."""
    (warning,) = online([50.0, 70.0, 69.0, 60.0, 55.0], [40.0, 60.0, 70.0, 80.0, 90.0])
    assert warning["step"] == 400
    assert "small: from step 200 to step 400" in warning["text"]
    assert capsys.readouterr().err.count("warning: ") == 1
    assert online([50.0, 60.0, 70.0], [40.0, 60.0, 80.0]) == []
    assert online([70.0, 60.0, 50.0], [80.0, 60.0, 40.0]) == []
    assert online([70.0, 69.0], [60.0, 90.0]) == []


def test_the_report_doubts_generations_that_learn_mistakes(three: Path) -> None:
    """Beside its other caveats; and only those."""
    story = read_story(find_checkpoint(str(three), "runs"))
    warned = "k-NN top-1 (generations): agreement rose."
    assert warned not in doubts(story)
    found = story.results["last"]["generations"] | {"warnings": ["agreement rose."]}
    assert warned in doubts(story._replace(results={"last": {"generations": found}}))


def test_the_measurement_of_generations_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its summary, of planted parts."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    bench = importlib.import_module("bench_generations")
    part = {"agreement": [70.0, 80.0], "ensemble": 55.0, "warnings": []}
    parts = {
        f"{seed}/{arm}": part | {"accuracy": [50.0, 51.0 + seed, 52.0 + 2 * seed]}
        for seed in (0, 1)
        for arm in ("pretrain", *bench.OBJECTIVES)
    }
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    out = tmp_path / "out.json"
    words = ["--seeds", "2", "--work", str(tmp_path), "--json", str(out), "--jobs", "1"]
    assert bench.main(words) == 0
    found = json.loads(out.read_text())
    assert found["pretrain"]["accuracy"] == [50.0, 51.5, 53.0]
    assert (found["logits"]["gain"], found["logits"]["gain_spread"]) == (3.0, 2.0)
    assert found["cwtm"]["ensemble_gain"] == 5.0
    assert "| pretrain | 50.0 | 51.5 | 53.0 | 55.0 | +3.0 (2.0) | 70.0, 80.0 |" in (
        capsys.readouterr().out
    )
