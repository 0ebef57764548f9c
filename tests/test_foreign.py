"""`checkpoint=` names weights that somebody else made: commands take them as they take a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dino_lite.backbones.vit import ViT
from dino_lite.commands.evaluate import run_evaluate
from dino_lite.commands.export import run_export
from dino_lite.config import compose
from dino_lite.contracts import UserError
from dino_lite.formats.safetensors import load_backbone, read_config
from dino_lite.formats.weights import load_pretrained
from dino_lite.runs.checkpoint import (
    Checkpoint,
    find_checkpoint,
    open_backbone,
)
from ranks import command
from test_importers import as_hugging_face_vit, dinov2, pretend_download, saved, small
from tiny import train

DATA = ["data=shapes", "data.num_train=24", "data.num_test=12", "accelerator=cpu"]


def find(path: Path) -> Checkpoint:
    return find_checkpoint(str(path), "runs")


def evaluate(checkpoint: object, runs_dir: Path, *overrides: str) -> dict[str, Any]:
    """k-NN of it on a few shapes."""
    chosen = [f"checkpoint='{checkpoint}'", f"runs_dir={runs_dir}", *DATA, *overrides]
    return run_evaluate(compose("evaluate", chosen))


def test_a_file_is_evaluated_and_its_results_lie_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What fitted is told, pixels are those it was made for, two files' results stay apart."""
    files = [saved(small().state_dict(), tmp_path, name) for name in ("a.pth", "b.pth")]
    for file in files:
        measured = evaluate(file, tmp_path / "runs")
        assert measured["knn"]["image_size"] == 32
        kept = json.loads(find(file).results_file.read_text())
        assert kept["knn@shapes"]["value"] == measured["knn"]["value"]
    assert {find(file).results_file.name for file in files} == {
        *("a.pth.results.json", "b.pth.results.json"),
    }
    said = capsys.readouterr().out
    assert "all 30 weights loaded, from DINO's layout" in said
    assert "num_heads=2" in said


def test_without_data_a_file_says_that_it_knows_none(tmp_path: Path) -> None:
    """It belongs to no run."""
    file = saved(small().state_dict(), tmp_path)
    with pytest.raises(UserError, match=r"does not record its training data: give data\.root="):
        run_evaluate(compose("evaluate", [f"checkpoint={file}", f"runs_dir={tmp_path}"]))


def test_a_hugging_face_folder_is_its_file(tmp_path: Path) -> None:
    """The folder is named, the weights are found and its config read."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    source = small(num_heads=8)
    save_file(as_hugging_face_vit(source.state_dict()), folder / "model.safetensors")
    about = {"architectures": ["ViTModel"], "num_attention_heads": 8, "layer_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(about))
    found = find_checkpoint(str(folder), tmp_path)
    assert (found.kind, found.path) == ("file", folder / "model.safetensors")
    opened = open_backbone(found)
    backbone = opened.backbone
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone(images).cls, source(images).cls)
    assert (backbone.in_chans, opened.image_size, opened.data) == (3, 32, None)
    assert json.loads(json.dumps(opened.card)) == opened.card


def test_dinov2s_weights_are_exported_whole(tmp_path: Path) -> None:
    """With registers, gates and mask token: the export opens as ours, and gives the same tokens."""
    weights = dinov2(num_registers=4, embed_dim=64, num_heads=1)
    file = saved({"teacher": weights}, tmp_path, "dinov2.pth")
    out = tmp_path / "out"
    chosen = [f"checkpoint={file}", f"out={out}", *DATA[:3], f"runs_dir={tmp_path}"]
    written = run_export(compose("export", chosen))["safetensors"]
    assert written["largest_difference"] == 0.0
    card = read_config(out)["card"]
    assert (card["weights"], card["layout"]) == ("dinov2.pth", "DINOv2 with registers")
    images = torch.randn(2, 3, 42, 28)
    again, first = load_backbone(out), open_backbone(find(file)).backbone
    assert torch.equal(again(images).registers, first(images).registers)
    assert (find(out).kind, find(out).path) == ("export", out)
    own = open_backbone(find_checkpoint(str(out / "model.safetensors"), tmp_path)).backbone
    assert torch.equal(own(images).cls, first(images).cls)


def test_without_a_folder_to_write_to_a_foreign_export_is_refused(tmp_path: Path) -> None:
    """There is no run to put it into."""
    file = saved(small().state_dict(), tmp_path)
    with pytest.raises(UserError, match="is not part of a run: give the folder"):
        run_export(compose("export", [f"checkpoint={file}", f"runs_dir={tmp_path}", *DATA[:3]]))


def test_a_timm_model_is_evaluated_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own size; its results lie in the folder of runs."""
    pretend_download(monkeypatch)
    measured = evaluate("timm:test_vit", tmp_path / "runs", "features_dir=null")
    assert measured["knn"]["image_size"] == 160
    kept = json.loads((tmp_path / "runs" / "timm_test_vit.results.json").read_text())
    assert kept["knn@shapes"]["value"] == measured["knn"]["value"]


def test_a_runs_checkpoint_outside_its_run_is_refused(tmp_path: Path) -> None:
    """Its sizes and switches stand in the run's config; inside, it is a run's as ever."""
    run = train(tmp_path / "runs", "trainer.max_steps=2")
    inside = run / "checkpoints" / "last.ckpt"
    found = find(inside)
    assert found.run is not None
    assert (found.kind, found.which) == ("run", "last")
    assert found.results_file == run / "results.json"
    content = torch.load(inside, weights_only=True)["state_dict"]
    start = ViT(image_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    load_pretrained(start, inside)  # of a run as of others, the teacher
    teachers = content["method.teachers.ema.module.backbone.cls_token"]
    assert torch.equal(start.cls_token, teachers)
    assert not torch.equal(start.cls_token, content["method.student.backbone.cls_token"])
    away = tmp_path / "away.ckpt"
    away.write_bytes(inside.read_bytes())
    with pytest.raises(UserError, match="not two folders up; keep checkpoints in their run"):
        open_backbone(find_checkpoint(str(away), tmp_path))


def test_a_file_two_below_some_config_is_no_runs(tmp_path: Path) -> None:
    """Only a run's folder "checkpoints" holds checkpoints of a run."""
    (tmp_path / "config.yaml").write_text("a: 1\n")
    file = saved(small().state_dict(), tmp_path / "weights")
    assert (find(file).kind, find(file).run, find(file).which) == ("file", None, None)
    assert isinstance(open_backbone(find(file)).backbone, ViT)


@pytest.mark.parametrize("kind", ["garbage", "resnet"])
def test_a_file_that_is_no_backbone_exits_with_a_sentence(kind: str, tmp_path: Path) -> None:
    """On the command line: exit code 2, one line, no traceback, no results."""
    file = saved({"conv1.weight": torch.zeros(3)}, tmp_path)
    if kind == "garbage":
        file.write_bytes(b"nothing")
    done = command("evaluate", f"checkpoint={file}", *DATA, f"runs_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"dino-lite: checkpoint={file} ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.glob("*.json")) == []


def test_nothing_of_that_name_is_a_sentence(tmp_path: Path) -> None:
    """Neither here nor among the runs."""
    with pytest.raises(UserError, match="is not a run, a file of weights or an exported folder"):
        find_checkpoint("absent", tmp_path)
