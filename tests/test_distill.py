"""`dino-lite distill`: several students in one run, their folders, a chain, what is refused."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
import transformers
from safetensors.torch import save_file

from dino_lite.commands.distill import run_distill
from dino_lite.commands.evaluate import evaluate
from dino_lite.commands.report import report
from dino_lite.commands.runs import run_runs
from dino_lite.config import compose, load
from dino_lite.contracts import UserError
from dino_lite.formats.safetensors import load_backbone
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.pretraining import run_pretrain
from dino_lite.runs.run import read_json
from ranks import SERVER, command
from test_pretrain import assert_same
from tiny import TINY, checkpoint, exported, tiny_command

VIT = "{backbone:vit,embed_dim:32,depth:1,num_heads:2,patch_size:8}"
STUDENTS = f"students={{small:{VIT},conv:{{backbone:convnet,widths:[8,16],depths:[1,1]}}}}"


def words(runs_dir: Path, teacher: Path | str, *overrides: str) -> list[str]:
    """A tiny distillation of both students, without exports."""
    ours = ("backbone.", "method.head.num_prototypes")
    keys = [f"{key}={value}" for key, value in TINY.items() if not key.startswith(ours)]
    usual = ["data=shapes", *keys, f"runs_dir={runs_dir}", f"teacher={teacher}"]
    if not any(word.startswith("students=") for word in overrides):
        usual.append(STUDENTS)
    return [*usual, "name=small", "distill.export=false", "callbacks.pictures=null", *overrides]


def run(runs_dir: Path, teacher: Path | str, *overrides: str) -> Path:
    """Run it in this process; the folder of the sequence."""
    arguments = words(runs_dir, teacher, *overrides)
    return Path(run_distill(compose("distill", arguments), arguments)["run"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DINO of two steps, with a head for class tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    words = ["method=dino", "trainer.max_steps=2", "name=teacher", "baselines=false"]
    return Path(run_pretrain(compose("pretrain", tiny_command(folder, *words)))["run"])


ALL = "loss=[cls_token,patch_tokens,masked_tokens,cls_similarity,patch_similarity]"


@pytest.fixture(scope="module")
def distilled(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two students of it, with all objectives but prototypes."""
    return run(tmp_path_factory.mktemp("whole"), teacher, ALL)


def test_each_student_has_a_folder_that_is_a_run(distilled: Path, teacher: Path) -> None:
    """Backbone, configuration, columns of metrics and results are its own; the teacher is named,
    and its weights are nowhere.
    """
    stage = distilled / "01_distill"
    content = checkpoint(stage)
    averages = "method.teachers.ema.module."
    for name in ("small", "conv"):
        own = stage / name
        config = load(own / "config.yaml")
        assert "students" not in config
        assert config["teacher"]["checkpoint"] == str(teacher)
        opened = open_backbone(find_checkpoint(str(own), "runs"))
        for key, value in opened.backbone.state_dict().items():
            assert torch.equal(value, content["state_dict"][f"{averages}{name}.backbone.{key}"])
        with open(own / "metrics.csv") as file:
            last = [row for row in csv.DictReader(file) if row["loss"]][-1]
        with open(stage / "metrics.csv") as file:
            whole = [row for row in csv.DictReader(file) if row["loss"]][-1]
        assert last["knn"] == whole[f"{name}/knn"]
        assert last["loss"] == whole[f"{name}/loss"]
        assert not [column for column in last if "/" in column]
        results = read_json(own / "results.json")
        assert results["finished"]
        assert results["steps"] == 8
        assert str(teacher) in results["teacher"]
        assert (own / "pca.png").is_file()
    assert not [key for key in content["state_dict"] if "frozen" in key or ".teacher." in key]
    assert read_json(stage / "results.json")["finished"]


def test_commands_take_a_student_as_they_take_a_run(distilled: Path) -> None:
    """The sequence's name opens the first; each by its folder."""
    first = find_checkpoint(str(distilled), "runs")
    assert first.path == distilled / "01_distill/small/checkpoints/last.ckpt"
    student = distilled / "01_distill" / "conv"
    found = evaluate(f"checkpoint={student}", f"runs_dir={distilled}")
    assert 0 <= found["knn"]["value"] <= 100
    assert report(f"checkpoint={student}", "draw=false", f"runs_dir={distilled}").is_file()
    (listed,) = run_runs(compose("runs", [f"runs_dir={student}"]))
    assert (listed["name"], listed["state"]) == ("small/01_distill/conv", "finished")


@pytest.mark.slow
def test_a_distillation_is_bit_equal_to_one_that_was_killed(
    distilled: Path, teacher: Path, tmp_path: Path
) -> None:
    """Students, averages, queue and moments; by the same command."""
    saving = ["callbacks.checkpoints.every_n_steps=5", ALL]
    process: Any = SERVER.Process(target=_killed, args=(tmp_path, teacher, saving))
    process.start()
    process.join(120)
    assert process.exitcode == 9
    assert checkpoint(tmp_path / "small" / "01_distill")["global_step"] == 5
    resumed = run(tmp_path, teacher, *saving)
    a, b = (checkpoint(folder / "01_distill") for folder in (distilled, resumed))
    assert a["global_step"] == b["global_step"] == 8
    assert_same(a["state_dict"], b["state_dict"])
    assert_same(a["optimizer_states"], b["optimizer_states"])


def _killed(runs_dir: Path, teacher: Path, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    stop = "+callbacks.killed={_target_: test_distill.KilledAt, step: 6}"
    run(runs_dir, teacher, *overrides, stop)


class KilledAt(pl.Callback):
    """Ends the process after a step without a word, as `kill -9` does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """End it where the step is reached."""
        if trainer.global_step == self.step:
            os._exit(9)


def test_a_teacher_that_has_changed_is_refused_when_the_run_is_resumed(
    teacher: Path, tmp_path: Path
) -> None:
    """In a sentence, though the run is not finished."""
    opened = open_backbone(find_checkpoint(str(teacher), "runs"))
    network = load_backbone(exported(opened.backbone, tmp_path / "t"))
    stop = "+callbacks.stop={_target_: tiny.StopAt, step: 2}"
    with pytest.raises(UserError, match="run the same command"):
        run(tmp_path, tmp_path / "t", stop)
    with torch.no_grad():
        next(network.parameters()).add_(1.0)
    exported(network, tmp_path / "t")
    with pytest.raises(UserError, match=r"teacher=.*has changed since this run was started"):
        run(tmp_path, tmp_path / "t", stop)


@pytest.mark.slow
def test_a_chain_teaches_the_next_student_by_the_former(teacher: Path, tmp_path: Path) -> None:
    """Each is a stage; the result is the last; a chain that grows is refused."""
    smaller = VIT.replace("32", "16")
    students = f"students={{a:{VIT},b:{smaller}}}"
    chain = ["distill.chain=true", "trainer.max_steps=2", "distill.export=true"]
    found = run(tmp_path, teacher, *chain, students, "loss=[cls_token]")
    stages = read_json(found / "sequence.json")["stages"]
    assert [stage["name"] for stage in stages] == ["01_a", "02_b"]
    second = load(found / "02_b" / "config.yaml")
    assert second["teacher"]["checkpoint"] == str(found / "01_a" / "a")
    assert find_checkpoint(str(found), "runs").path == found / "02_b/b/checkpoints/last.ckpt"
    backbone = load_backbone(found / "02_b" / "b" / "export" / "safetensors")
    assert backbone.embed_dim == 16
    card = (found / "02_b" / "b" / "export" / "safetensors" / "README.md").read_text()
    assert f"a, frozen (digest {second['teacher']['digest']}" in card
    assert str(tmp_path) not in card
    grows = f"students={{b:{smaller},a:{VIT}}}"
    with pytest.raises(UserError, match=r"chain=true: a has .* more than .* of b"):
        run(tmp_path, teacher, "distill.chain=true", grows, "name=grows")
    assert not (tmp_path / "grows").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher=null"], r"teacher= is missing"),
        (["teacher=latest"], r"teacher=latest: name the run"),
        (["teacher=nowhere"], r"teacher=nowhere is not a run"),
        (["students=[]"], r"students= is missing"),
        (["students=[vit_tinny]"], r"students=vit_tinny.*did you mean vit_tiny"),
        (["students=[vit_tiny,vit_tiny]"], r"students names vit_tiny twice"),
        (["students={a:{backbone:vit,patch:8}}"], r"students.a.patch: there is no such key"),
        (["students={../a:null}"], r"cannot name a folder"),
        ([f"students={{a:{VIT},b:{VIT.replace('size:8', 'size:6')}}}"], r"patches of 6 pixels"),
        (["data.channels=1"], r"teacher=.* takes images of 3 channels"),
        (["loss=[ibot]"], r"no projection head with prototypes for patches"),
        (["distill.chain=3"], r"distill.chain=3: it must be true or false"),
        (["distill.chains=true"], r"distill.chains: there is no such key"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    teacher: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    """Each in one sentence that names the key."""
    with pytest.raises(UserError, match=said):
        run(tmp_path, teacher, *overrides)
    assert not [*tmp_path.iterdir()]


def test_a_file_that_is_no_backbone_is_refused(tmp_path: Path) -> None:
    """A file of other tensors, and one of text."""
    torch.save({"layer.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    for name in ("other", "text"):
        with pytest.raises(UserError, match=rf"{name}\.pth"):
            run(tmp_path / "runs", tmp_path / f"{name}.pth")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_weights_of_transformers_and_timm_teach_by_the_command_line(tmp_path: Path) -> None:
    """Random weights in real layouts: DINOv2 with patches of 14 pixels, and a ResNet by timm."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    dinov2 = transformers.Dinov2Model(transformers.Dinov2Config(image_size=56, **sizes))
    dinov2.save_pretrained(tmp_path / "dinov2")
    resnet = timm.create_model("resnet18", num_classes=0)
    save_file(resnet.state_dict(), tmp_path / "resnet18.safetensors")
    for name in ("dinov2", "resnet18.safetensors"):
        steps = ["trainer.max_steps=2", f"name={name.partition('.')[0]}", "~callbacks.online_eval"]
        found = command("distill", *words(tmp_path, tmp_path / name, *steps))
        assert found.returncode == 0, found.stderr[-2000:]
        stage = tmp_path / name.partition(".")[0] / "01_distill"
        assert (stage / "conv" / "checkpoints" / "last.ckpt").is_file()
    found = command("distill", *words(tmp_path, tmp_path / "nothing.pth"))
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert json.loads((tmp_path / "dinov2" / "config.json").read_text())["patch_size"] == 14
