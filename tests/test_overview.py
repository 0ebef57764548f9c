"""The printed plan: ten lines with what matters, every choice on request, notes apart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dino_lite.backbones.vit import ViT
from dino_lite.config import compose, instantiate
from dino_lite.planning.overview import embedded, network_size, overview
from dino_lite.planning.plan import Plan, plan
from dino_lite.runs.identity import requested
from dino_lite.runs.lengths import other_length
from dino_lite.runs.pretraining import run_pretrain
from dino_lite.runs.run import Run, write_json
from test_conf import facts
from tiny import tiny


def planned(*overrides: str, **changes: object) -> Plan:
    return plan(compose("pretrain", overrides), facts(**changes))


def test_a_plan_is_nine_lines_of_what_was_chosen_why_and_what_changes_it() -> None:
    """Of a folder of photographs on a laptop."""
    told = planned()
    known = facts(num_classes=4, num_test=20)
    text = overview(told, known, {"features": 3072, "parameters": 2_150_000}, "the folders a, b")
    why = {decision.key: f"({decision.reason})" for decision in told.decisions}
    network, prototypes = "resnet, 3,072 features, 2.1 million parameters", "512 prototypes"
    crops = f"2 of 64 and 4 of 32 pixels, patches of 8 {why['augment.global_size']}"
    assert text.splitlines()[:-1] == [
        "  data     photos: 5,000 images of about 400x300 pixels, 20 test images",
        "  labels   4 classes (the folders a, b) [data.labels=none]",
        f"  device   cpu, float32 {why['trainer.precision']}",
        f"  network  {network} {why['backbone']} [backbone=vit_small]",
        f"  method   dino, loss dino, {prototypes} {why['method.head.num_prototypes']} "
        "[method=dinov2]",
        f"  crops    {crops} [augment.global_size=96]",
        f"  batch    64 images {why['loader.batch_size']} [loader.batch_size=128]",
        f"  length   30m {why['trainer.max_time']} [trainer.max_time=2h]",
    ]
    assert f"plan=full lists all {len(told.decisions)} automatic choices" in text


def test_what_was_given_has_no_reason() -> None:
    """Nor has a length whose other measures were settled."""
    text = overview(
        planned("trainer.max_steps=1", "loader.batch_size=1", "method=dinov2", "backbone=vit_tiny"),
        facts(),
    )
    assert "  length   1 step [" in text
    assert "  batch    1 image [" in text
    assert "  network  vit_tiny_patch16_224 [" in text
    assert "  method   dinov2, loss dino + ibot + koleo, " in text
    assert "  labels   none\n" in text


def test_what_is_suggested_can_be_given() -> None:
    """Each example in brackets plans."""
    lines = overview(planned("optim.clip=1"), facts()).splitlines()
    words = [line.rpartition("[")[2].strip("]") for line in lines if line.endswith("]")]
    assert len(words) == 5
    assert planned(*words)


@pytest.mark.parametrize(
    ("words", "larger"),
    [
        ("augment.global_size=48 backbone=convnet", 96),
        ("augment.global_size=224 backbone=resnet50", 352),
        ("augment.global_size=224 backbone=vit_small backbone.patch_size=14", 336),
    ],
)
def test_larger_crops_are_about_half_as_large_again(words: str, larger: int) -> None:
    """In whole patches, also of the patch size that the larger crops get."""
    assert f"[augment.global_size={larger}]" in overview(planned(*words.split()), facts())
    node = planned(*words.split(), f"augment.global_size={larger}").config["backbone"]
    with torch.device("meta"):
        assert instantiate({key: node[key] for key in node if key != "pretrained"})


def test_width_and_parameters_are_those_of_the_network() -> None:
    """A ViT of width 8: weights of patches, positions, a class token, a block, the last norm."""
    network = ViT(embed_dim=8, depth=1, num_heads=2, image_size=8, patch_size=4)
    block = 2 * 16 + (3 * 64 + 24) + (64 + 8) + (256 + 32) + (256 + 8)
    assert network_size(network) == {"features": 8, "parameters": 392 + 40 + 8 + block + 16}


def test_only_data_that_nobody_chose_are_explained() -> None:
    """No data.root: the embedded set; not where it was asked for."""
    assert "No data.root was given" in embedded(compose("pretrain", []))[0]
    assert embedded(compose("pretrain", ["data=shapes"])) == []
    assert embedded(compose("pretrain", ["photos/"])) == []


def test_how_much_is_printed_is_no_part_of_a_run() -> None:
    """plan=full has the same name and resumes the same run."""
    assert requested(compose("pretrain", ["plan=full"])) == requested(compose("pretrain", []))


@pytest.mark.slow
def test_a_run_prints_its_plan_in_ten_lines_and_notes_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then all of it with plan=full; a run like an earlier one but longer names that one."""
    monkeypatch.setattr("dino_lite.runs.pretraining.finish", lambda *_: None)
    first = run_pretrain(tiny(tmp_path, "trainer.max_steps=2"))["run"]
    plan_of_first, *rest = capsys.readouterr().out.split("\n\n")
    assert plan_of_first.splitlines()[0] == f"run {first}"
    assert len(plan_of_first.splitlines()) == 10
    assert "  network  vit, 32 features, " in plan_of_first
    assert "This begins another run" not in "".join(rest)
    run_pretrain(tiny(tmp_path, "trainer.max_steps=3", "plan=full"))
    full, note, *_ = capsys.readouterr().out.split("\n\n")
    assert "  optim.learning_rate.warmup=0.1" in full
    assert note.startswith(f"This begins another run than {first}, whose settings are the same ex")


def test_another_length_is_another_run_and_nothing_else_is(tmp_path: Path) -> None:
    """The latest with weights is named; not one of another seed, nor one that lacks only a new key
    with a default, nor one that cannot be read.
    """

    def saved(name: str, *overrides: str, without: str = "", at: int = 0) -> None:
        request = requested(compose("pretrain", overrides))
        request.pop(without, None)
        run = Run(tmp_path / name)
        run.checkpoints.mkdir(parents=True)
        write_json(run.environment_file, {"request": request})
        run.last.touch()
        os.utime(run.last, (at, at))

    asked = requested(compose("pretrain", ["trainer.max_steps=9"]))
    new = Run(tmp_path / "new")
    saved("same", "trainer.max_steps=9")
    saved("seed", "trainer.max_steps=5", "seed=1")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "environment.json").write_text('{"request": 3}')
    assert other_length(new, asked) is None
    saved("timed", "trainer.max_time=5m", at=1)
    saved("older", "trainer.max_steps=7", without="optim.clip", at=2)
    said = other_length(new, asked)
    assert said is not None
    assert (
        f"{tmp_path / 'older'}, whose settings are the same except for trainer.max_steps=7" in said
    )
    assert said.endswith(f"add checkpoint={tmp_path / 'older'}.")
    saved("bare", at=3)
    assert "same except for its automatic length:" in str(other_length(new, asked))
