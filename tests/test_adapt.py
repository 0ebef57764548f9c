"""`dino-lite adapt`: what it starts from, its stages, what it measures, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from dino_lite import adapt
from dino_lite.commands.evaluate import evaluate
from dino_lite.commands.report import report
from dino_lite.config import compose, load
from dino_lite.contracts import UserError
from dino_lite.data.shapes import open_shapes
from dino_lite.planning.checks import check_values
from dino_lite.runs.adaptation import collections
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.run import Run, read_json
from ranks import command
from test_importers import pretend_download
from tiny import TINY, exported, train

KEYS = {
    **{key: value for key, value in TINY.items() if not key.startswith(("data.", "backbone."))},
    "trainer.max_steps": 2,
    "callbacks.pictures": "null",
    "callbacks.online_eval": "null",
}


def words(*overrides: str) -> list[str]:
    """A tiny adaptation as arguments."""
    return [*(f"{key}={value}" for key, value in KEYS.items()), *overrides]


def npz(folder: Path, name: str, seed: int, labeled: bool = True) -> Path:
    """A collection of 44 drawn shapes in a file."""
    splits = open_shapes(num_train=44, num_test=20, image_size=16, seed=seed)
    arrays = {}
    for part, source in (("train", splits.train), ("test", splits.test)):
        arrays[f"x_{part}"] = np.stack([source.read(i) for i in range(len(source))])
        if labeled:
            arrays[f"y_{part}"] = np.asarray(source.labels)
    file = folder / f"{name}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **arrays)
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with collections and a pretrained run, runs/START."""
    folder = tmp_path_factory.mktemp("adapt")
    for seed, name in enumerate(("a", "b", "old"), start=1):
        npz(folder, name, seed)
    npz(folder / "other", "a", 4)
    npz(folder, "plain", 5, labeled=False)
    npz(folder, "bare", 6, labeled=False)
    train(folder / "runs", "name=START", "trainer.max_steps=2")
    return folder


@pytest.fixture(scope="module")
def one(base: Path) -> dict[str, Any]:
    """An adaptation to one collection that keeps another."""
    given = (f"checkpoint={base / 'runs' / 'START'}", f"keep.root={base / 'old.npz'}")
    return adapt(*words(str(base / "a.npz"), *given, f"runs_dir={base / 'runs'}", "name=one"))


@pytest.fixture(scope="module")
def several(base: Path) -> Path:
    """A sequence of two collections of one name, with replay and a third to be kept."""
    roots = ",".join(str(base / name) for name in ("a.npz", "other/a.npz"))
    given = (f"stages=[{roots}]", f"keep.root={base / 'old.npz'}", "keep.share=0.25")
    start = f"checkpoint={base / 'runs' / 'START'}"
    return Path(adapt(*words(start, *given, f"runs_dir={base / 'runs'}", "name=many"))["run"])


def test_a_run_of_the_same_method_goes_on_with_its_heads(base: Path, one: dict[str, Any]) -> None:
    stage = Path(one["run"]) / "01_adapt"
    config = load(stage / "config.yaml")
    start = base / "runs" / "START"
    assert config["checkpoint"] == str(start)
    assert config["teacher"]["checkpoint"] == str(start)
    assert config["backbone"]["embed_dim"] == TINY["backbone.embed_dim"]
    assert {"kept", "kept_gram"} <= config["loss"].keys()
    assert config["augment"]["global_size"] == TINY["augment.global_size"]


def test_start_end_and_result_are_on_disk_and_the_result_is_opened(one: dict[str, Any]) -> None:
    folder = Path(one["run"])
    saved = folder / "01_adapt" / "checkpoints"
    assert {"start.ckpt", "last.ckpt", "adapted.ckpt"} <= {path.name for path in saved.iterdir()}
    found = find_checkpoint(str(folder), "")
    assert found.path == saved / "adapted.ckpt" == Path(one["result"])
    open_backbone(found)
    told = one["stages"]["01_adapt"]
    assert [each["name"] for each in told["collections"]] == ["a", "old"]
    assert told["sentences"]


def test_the_result_is_evaluated_under_its_own_name(one: dict[str, Any]) -> None:
    evaluate(f"checkpoint={one['run']}", "features_dir=null")
    assert "knn" in Run(Path(one["run"]) / "01_adapt").results()["adapted"]


def test_the_report_shows_before_and_after(one: dict[str, Any]) -> None:
    text = report(f"checkpoint={one['run']}", "draw=false").read_text(encoding="utf-8")
    for told in ("Before and after", "START", "adapted (alpha", "dino-lite adapt"):
        assert told in text


def test_each_collection_of_a_sequence_is_measured_after_each_stage(several: Path) -> None:
    stages = read_json(several / "sequence.json")["stages"]
    history = stages[-1]["results"]["history"]
    assert history["collections"] == ["old", "a (1)", "a (2)"]
    assert history["rows"] == ["start", "after a (1)", "after a (2)"]
    assert np.asarray(history["accuracy"], float).shape == (3, 3)
    assert not np.isnan(np.asarray(history["accuracy"], float)).any()
    before = stages[0]["results"]["history"]["accuracy"]
    assert history["accuracy"][: len(before)] == before
    assert history["average_accuracy"] == pytest.approx(np.mean(history["accuracy"][-1]))
    assert (several / "matrix.png").is_file()


def test_later_stages_go_on_from_the_result_and_replay_all_earlier(several: Path) -> None:
    config = load(several / "02_adapt" / "config.yaml")
    former = str(several / "01_adapt" / "checkpoints" / "adapted.ckpt")
    assert config["checkpoint"] is None
    assert config["backbone"]["pretrained"] == former == config["teacher"]["checkpoint"]
    assert [*config["data"]["keep"]] == ["old", "a"]
    assert config["data"]["share"] == 0.25


def test_a_later_stage_goes_on_with_the_heads_of_the_former(
    several: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a result alone, as another adaptation starts from."""
    given = (f"checkpoint={several}", f"runs_dir={base / 'runs'}", "name=next")
    adapt(*words(str(base / "plain.npz"), *given))
    said = capsys.readouterr().out
    assert "head is the file's" in said
    assert "all 30 weights loaded, from dino_lite's layout" in said
    assert "No choice was made, as plain has no labels" in said


def test_the_report_of_a_sequence_has_the_matrix(several: Path) -> None:
    text = report(f"checkpoint={several}", "draw=false").read_text(encoding="utf-8")
    for told in ("Forward transfer", "after a (2)", 'id="02_adapt"', "Average accuracy"):
        assert told in text


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dinov2", "dinov3", "simdinov2"])
def test_other_methods_adapt_a_bare_backbone(base: Path, method: str) -> None:
    """An export has no heads, and no masks were learned."""
    opened = open_backbone(find_checkpoint("START", base / "runs"))
    weights = exported(opened.backbone, base / f"export_{method}", 16)
    others = {"method.head.num_prototypes"} if method.startswith("simdino") else set()
    given = [each for each in words() if each.partition("=")[0] not in others]
    extra = ["loss.simdino.num_images=8"] if method.startswith("simdino") else []
    adapted = adapt(
        *given,
        *extra,
        str(base / "plain.npz"),
        f"method={method}",
        f"checkpoint={weights}",
        f"runs_dir={base / 'runs'}",
        f"name=of_{method}",
    )
    config = load(Path(adapted["run"]) / "01_adapt" / "config.yaml")
    assert config["backbone"]["embed_dim"] == TINY["backbone.embed_dim"]
    assert config["normalize"]["mean"] == [0.5, 0.4, 0.3]


@pytest.mark.slow
def test_files_of_timm_with_their_json(base: Path, tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, depth=2, num_classes=0
    )
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    given = (f"checkpoint={tmp_path / 'vit.pth'}", f"runs_dir={tmp_path}", "name=timm")
    run = adapt(*words(str(base / "plain.npz"), *given, "augment.local_size=16"))
    assert open_backbone(find_checkpoint(run["run"], "")).backbone.embed_dim == 192


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*in eval mode")  # of pretend_download
def test_a_model_of_timm_is_downloaded_once_and_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pretend_download(monkeypatch)
    given = ("checkpoint=timm:test_vit", f"runs_dir={tmp_path}", "name=timm")
    sizes = ("augment.global_size=32", "augment.local_size=16")
    run = Path(adapt(*words(str(base / "plain.npz"), *given, *sizes))["run"])
    kept = open_backbone(find_checkpoint(str(run / "start"), ""))
    begun = open_backbone(find_checkpoint(str(run / "01_adapt" / "checkpoints" / "start.ckpt"), ""))
    weight = made[0].state_dict()["blocks.0.attn.qkv.weight"]
    for opened in (kept, begun):
        assert torch.equal(opened.backbone.state_dict()["blocks.0.attn.qkv.weight"], weight)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], r"checkpoint= is missing"),
        (["checkpoint=START", "keep.root=a.npz"], r"keep\.root and data\.root hold the same"),
        (["checkpoint=START", "keep.root=copy.npz"], r"keep\.root and data\.root hold the same"),
        (["checkpoint=START", "keep.share=0.2"], r"keep\.share=0\.2: there is nothing to replay"),
        (["checkpoint=START", "keep.share=1"], r"keep\.share=1: it must be a number of at least 0"),
        (["checkpoint=START", "adapt.max_loss=2"], r"adapt\.max_loss=2 limits .* there is none"),
        (
            ["checkpoint=START", "adapt.max_loss=2", "keep.root=plain.npz"],
            r"adapt\.max_loss=2 limits",
        ),
        (["checkpoint=START", "adapt.max_lost=2"], r"did you mean adapt\.max_loss\?"),
        (["checkpoint=a.npz"], r"a\.npz"),
        (["checkpoint=empty.pth"], r"empty\.pth holds no backbone"),
        (["checkpoint=START", "backbone.pretrained=x"], r"leave one out"),
        (["checkpoint=START", "stages=[b.npz]"], r"data\.root= and stages= both name images"),
        (["checkpoint=START", "keep.root=nowhere"], r"nowhere does not exist"),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(
    base: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], said: str
) -> None:
    monkeypatch.chdir(base)
    if not (base / "copy.npz").exists():
        (base / "copy.npz").write_bytes((base / "a.npz").read_bytes())
        torch.save({"a": torch.zeros(2)}, base / "empty.pth")
    with pytest.raises(UserError, match=said):
        adapt(*words("data.root=a.npz", *given, "name=refused"))
    assert not (base / "runs" / "refused").exists()


def test_two_stages_of_the_same_images_are_refused(base: Path) -> None:
    stages = f"stages=[{base / 'a.npz'},{base / 'a.npz'}]"
    with pytest.raises(UserError, match=r"stages\[1\] and stages\[0\] hold the same images"):
        adapt(*words(f"checkpoint={base / 'runs' / 'START'}", stages, f"runs_dir={base}"))


def test_stages_may_name_kinds_of_data(tmp_path: Path) -> None:
    config = check_values(compose("adapt", ["stages=[shapes,cifar10]"]))
    assert [node["_target_"].rpartition(".")[2] for _, node in collections(config)] == [
        "open_shapes",
        "open_builtin",
    ]


@pytest.mark.slow
def test_two_processes_adapt_as_one(base: Path, tmp_path: Path) -> None:
    """Both go through all stages; the first measures while the other waits."""
    roots = ",".join(str(base / name) for name in ("plain.npz", "bare.npz"))
    given = [f"checkpoint={base / 'runs' / 'START'}", f"stages=[{roots}]", "name=r"]
    adapt(*words(*given, f"runs_dir={tmp_path / 'one'}"))
    more = ["trainer.devices=2", f"runs_dir={tmp_path / 'two'}"]
    result = command("adapt", *words(*given, *more), ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("No choice was made") == 2  # the first rank alone tells
    for stage in ("01_adapt", "02_adapt"):
        files = [tmp_path / n / "r" / stage / "checkpoints" / "last.ckpt" for n in ("one", "two")]
        single, both = (torch.load(file, weights_only=True)["state_dict"] for file in files)
        for name, value in single.items():
            torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-5, msg=name)
