"""`dino-lite compare`: checkpoints and baselines side by side."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dino_lite.commands.compare import Row, as_markdown, run_compare
from dino_lite.commands.evaluate import run_evaluate
from dino_lite.commands.export import run_export
from dino_lite.config import Config, compose, put
from dino_lite.contracts import Evaluation, UserError
from dino_lite.eval import baselines
from dino_lite.eval.results import result
from dino_lite.report.terminal import print_comparison
from test_importers import pretend_download, saved, small
from tiny import photos, tiny, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one network that differ in their seed, and one on other images at other sizes."""
    folder = tmp_path_factory.mktemp("runs (é)")
    train(folder, "name=a b", "trainer.max_steps=2")
    train(folder, "name=é", "trainer.max_steps=2", "seed=1")
    names = [f"{c}/{i}.png" for c in "xy" for i in range(6)]
    root = photos(folder.parent / "photos", names)
    sizes = ["augment.global_size=24", "trainer.max_steps=2"]
    train(folder, "name=other", f"data.root={root}", *sizes, data="folder")
    return folder


def asked(runs: Path, *overrides: str) -> Config:
    return compose("compare", [f"runs_dir={runs}", "accelerator=cpu", *overrides])


@pytest.mark.slow
def test_checkpoints_and_baselines_stand_side_by_side(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names with spaces and accents work; each checkpoint's results lie in its own results.json."""
    told = run_compare(asked(runs, f"checkpoints=[a b,{runs}/é/checkpoints/last.ckpt]"))
    assert [row["name"] for row in told["rows"]] == ["a b", "é", "raw pixels", "untrained"]
    said = capsys.readouterr().out
    for row in told["rows"]:
        assert f"{row['results']['knn']['value']:.2f} %" in said
    for name, row in zip(["a b", "é"], told["rows"], strict=False):
        kept = json.loads((runs / name / "results.json").read_text())["last"]["knn"]
        assert kept["value"] == row["results"]["knn"]["value"]
        assert kept["baselines"]["untrained"]["value"] == told["rows"][3]["results"]["knn"]["value"]


def test_an_interrupt_says_what_is_kept(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And that the table is missing."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dino_lite.eval.retrieval.Retrieval.__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_compare(asked(runs, "checkpoints=[a b,é]", "eval=[knn,retrieval]"))
    said = capsys.readouterr().out
    assert "interrupted: knn of a b kept in results.json of each; no table was made" in said


@pytest.mark.slow
def test_equal_baselines_are_measured_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for two networks alike; others of another size, and each then says whose it is."""
    drawn: list[str] = []
    for name in ("raw_pixels", "untrained"):
        real = getattr(baselines, name)
        monkeypatch.setattr(
            baselines,
            name,
            lambda *args, real=real, name=name: drawn.append(name) or real(*args),
        )
    run_compare(asked(runs, "checkpoints=[a b,é]"))
    assert drawn == ["raw_pixels", "untrained"]
    told = run_compare(asked(runs, "checkpoints=[a b,other]"))
    assert len(drawn) == 6
    titles = [
        f"{title}, as {name}" for name in ("a b", "other") for title in ("raw pixels", "untrained")
    ]
    assert [row["name"] for row in told["rows"]] == ["a b", "other", *titles]
    assert [row["image_size"] for row in told["rows"]] == [16, 24, 16, 16, 24, 24]


def test_training_on_other_data_is_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All are measured on the data of the first, and results of foreign data carry its name."""
    told = run_compare(asked(runs, "checkpoints=[a b,other]", "baselines=false"))
    assert told["notes"] == ["other was trained on other data: photos, 12 images"]
    assert told["notes"][0] in capsys.readouterr().out
    assert "knn@shapes" in json.loads((runs / "other" / "results.json").read_text())["last"]
    assert {row["results"]["knn"]["num_test"] for row in told["rows"]} == {20}


def test_best_latest_and_exports_can_be_compared(runs: Path) -> None:
    """Every kind of checkpoint has its row; the same one twice has one."""
    run_export(compose("export", [f"checkpoint={runs}/é", "data=shapes"]))
    export = runs / "é" / "export" / "safetensors"
    best = runs / "é" / "checkpoints" / "best.ckpt"
    shutil.copy(runs / "é" / "checkpoints" / "last.ckpt", best)
    told = run_compare(asked(runs, f"checkpoints=[é,é,{best},{export},latest]", "baselines=false"))
    names = [row["name"] for row in told["rows"]]
    assert names == ["é", "é (best)", str(export), "other"]
    values = [row["results"]["knn"]["value"] for row in told["rows"]]
    assert values[0] == values[1] == values[2]
    assert "knn@shapes" in json.loads((export / "results.json").read_text())


@pytest.mark.parametrize("suffix", ["json", "csv", "md"])
def test_the_table_is_written_where_it_is_asked_for(
    runs: Path, tmp_path: Path, suffix: str
) -> None:
    """Each form holds every row with its number."""
    out = tmp_path / "new" / f"table.{suffix}"
    told = run_compare(asked(runs, "checkpoints=[é]", f"out={out}"))
    text = out.read_text(encoding="utf-8")
    if suffix == "json":
        assert json.loads(text) == told
    elif suffix == "csv":
        rows = list(csv.DictReader(text.splitlines()))
        wanted = [row["results"]["knn"]["value"] for row in told["rows"]]
        assert [float(row["value"]) for row in rows] == wanted
        assert [row["name"] for row in rows] == ["é", "raw pixels", "untrained"]
    else:
        lines = text.splitlines()
        assert lines[0] == "| shapes | pixels | knn: k-NN top-1 |"
        assert len([line for line in lines if line.startswith("|")]) == 5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "checkpoints= is missing"),
        (["checkpoints=[é]", "out=table.txt"], r"out=table.txt: name a file that ends in \.json"),
        (["checkpoints=[é,nowhere]"], "checkpoint=nowhere is not a run"),
        (["checkpoints=[é]", "image_size=17"], "multiple of the backbone's patch size"),
        (["checkpoints=[é]", "eval=[]"], "eval= lists no evaluation"),
    ],
)
def test_mistakes_are_sentences(runs: Path, overrides: list[str], words: str) -> None:
    """Before anything is measured."""
    with pytest.raises(UserError, match=words):
        run_compare(asked(runs, *overrides))


def test_intervals_are_shown_where_they_are_known(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In the terminal and in the table."""

    class Fixed(Evaluation):
        def __call__(self, backbone: Any, store: Any) -> dict[str, Any]:
            return {
                **{"metric": "luck", "value": 50.0, "unit": "%", "interval": [40.0, 60.0]},
                **{"protocol": "a coin", "settings": {}, "num_train": 1, "num_test": 2},
            }

    config = put(asked(runs, "checkpoints=[é]", f"out={tmp_path}/t.md"), "eval", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dino_lite.commands.compare.build_evaluations", lambda _: {"luck": Fixed()})
        run_compare(config)
    assert "40.00 to 60.00" in capsys.readouterr().out
    assert "| é | 16 | 50.00 % (40.00 to 60.00) |" in (tmp_path / "t.md").read_text()


def test_foreign_files_and_names_of_timm_can_be_compared(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each at its own size."""
    pretend_download(monkeypatch)
    file = saved(small().state_dict(), tmp_path)
    data = ["data=shapes", "data.num_train=24", "data.num_test=12", "baselines=false"]
    told = run_compare(asked(runs, f"checkpoints=['{file}','timm:test_vit']", *data))
    rows = [(row["name"], row["image_size"]) for row in told["rows"]]
    assert rows == [(str(file), 32), ("timm:test_vit", 160)]
    (runs / "timm_test_vit.results.json").unlink()


def row(name: str, **settings: Any) -> Row:
    """A result by hand, with a name and settings."""
    found = result("top-1", 50.0, protocol="by hand", settings=settings, num_train=1, num_test=2)
    return Row(name, name, 16, {"first": found, "second": found})


def test_settings_are_told_where_they_hold_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that were chosen for each are not."""
    print_comparison([row("a", k=20, C=0.1), row("b", k=20, C=10.0)])
    assert "first: by hand (k=20)\n" in capsys.readouterr().out


def test_a_cell_stays_below_its_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    """A baseline that has no first result has its second one in the second column."""
    rows = [row("a"), row("b")]
    del rows[1].results["first"]
    print_comparison(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].index("50.00") == lines[1].rindex("50.00")
    told = {"data": "x", "notes": [], "rows": [each._asdict() for each in rows]}
    assert "| b | 16 |  | 50.00 % |" in as_markdown(told)


def test_data_of_a_run_is_known_as_its_own(runs: Path) -> None:
    """`evaluate` on what was asked for by name marks results of other data, also without a root."""
    config = compose("evaluate", [f"checkpoint={runs}/other", "data=shapes", "accelerator=cpu"])
    config = put(put(config, "data.num_train", 12), "data.num_test", 8)
    run_evaluate(config | {"image_size": 16})
    kept = json.loads((runs / "other" / "results.json").read_text())["last"]
    assert kept["knn@shapes@16px"]["num_test"] == 8
    assert "knn" not in kept
    assert tiny(runs)["overrides"] == ["data=shapes"]
