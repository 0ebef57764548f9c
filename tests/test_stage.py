"""A run that holds on to a frozen network: resumed to the bit; the file, drift, what is refused."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_lite.contracts import UserError
from dino_lite.runs.pretraining import run_pretrain
from test_lora import ADAPTER, L2SP, stage
from test_pretrain import assert_same
from tiny import checkpoint, tiny, train

DRIFT = "callbacks.drift={_target_: dino_lite.callbacks.drift.Drift, max_images: 16}"
STOP = "callbacks.stop={_target_: tiny.StopAt, step: 5}"
WAYS = {
    "retention": ["backbone.drop_path=0.2"],
    "l2sp": [L2SP],
    "lora": [ADAPTER],
    "blocks": ["optim.last_blocks=1"],
    "freeze": ['optim.freeze_backbone="2 steps"', 'optim.backbone_ramp="5 steps"'],
}


def rows_of(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to hold on to."""
    return train(tmp_path_factory.mktemp("stage"), "name=old", "trainer.max_steps=3")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_stage_is_bit_equal_to_an_uninterrupted_one(old: Path, way: str) -> None:
    """Weights, moments and metrics; its checkpoint names the frozen network, without its weights;
    the first row has no drift.
    """
    words = stage(old, way, DRIFT, *WAYS[way])
    with pytest.raises(UserError, match="run the same command to resume"):
        run_pretrain(tiny(old.parent / "parts", *words, STOP))
    resumed = train(old.parent / "parts", *words)
    whole = train(old.parent / "whole", *words)
    a, b = checkpoint(whole), checkpoint(resumed)
    assert a["global_step"] == b["global_step"] == 8
    assert_same(a["state_dict"], b["state_dict"])
    assert_same(a["optimizer_states"], b["optimizer_states"])
    roles = {"teacher", "start"} if way == "l2sp" else {"teacher"}
    assert a["frozen"].keys() == roles
    assert {each["digest"] for each in a["frozen"].values()} == {b["frozen"]["teacher"]["digest"]}
    known = checkpoint(old)["state_dict"].keys()
    assert {n for n in a["state_dict"] if "lora_" not in n} == set(known)
    rows = [rows_of(run) for run in (whole, resumed)]
    drifts = [{row["step"]: row["drift"] for row in each if row["drift"]} for each in rows]
    assert drifts[0] == drifts[1]
    assert float(drifts[0]["0"]) == float(rows[0][0]["drift_patches"]) == 0.0
    assert float(drifts[0]["7"]) > 1e-6


@pytest.mark.slow
def test_a_start_with_heads_begins_as_its_teacher(old: Path) -> None:
    """Of an earlier run the teacher is held on to, so the student begins as that."""
    words = [word for word in stage(old, "heads", DRIFT) if "pretrained" not in word]
    run = train(old.parent, *words, f"checkpoint={old}", "trainer.max_steps=2")
    assert float(rows_of(run)[0]["drift"]) == 0.0


def test_a_frozen_network_that_changed_is_refused(old: Path, tmp_path: Path) -> None:
    """In one sentence, before anything is trained, whether it is the teacher or the start."""
    copied = shutil.copytree(old, tmp_path / "old")
    words = stage(copied, "stage")
    with pytest.raises(UserError, match="run the same command to resume"):
        run_pretrain(tiny(tmp_path, *words, STOP))
    file = copied / "checkpoints" / "last.ckpt"
    content: Any = torch.load(file, weights_only=True)
    torch.save(content | {"more": 1}, file)
    with pytest.raises(UserError, match=r"last\.ckpt has changed since this run was started"):
        run_pretrain(tiny(tmp_path, *words))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optim.last_blocks=3"], r"optim\.last_blocks=3: the backbone has 2 blocks"),
        (['optim.freeze_backbone="9 steps"'], r"freeze_backbone=9 steps is longer than the run"),
        (["optim.freeze_backbone=0.6", "optim.backbone_ramp=0.6"], "are together longer than"),
        (["optim.last_blocks=0"], r"optim\.last_blocks=0: it must be"),
        (["optim.rate_scale=-1"], r"optim\.rate_scale=-1: it must be"),
        (["adapter={_target_: dino_lite.nn.lora.LoRA, rank: 0}"], r"adapter\.rank=0: it must be"),
    ],
)
def test_settings_that_cannot_be_are_a_sentence(
    words: list[str], sentence: str, old: Path, tmp_path: Path
) -> None:
    """Before anything is trained."""
    with pytest.raises(UserError, match=sentence):
        run_pretrain(tiny(tmp_path, *stage(old, "bad", *words)))
    assert not (tmp_path / "bad").exists()
