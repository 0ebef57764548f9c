"""Runs and exports made before the rooms moved (tests/old) open as they did then.

Their tokens in expected.safetensors are those that the code of that day computed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dino_lite
from dino_lite.commands.evaluate import run_evaluate
from dino_lite.commands.export import run_export
from dino_lite.config import compose, load, put, save
from dino_lite.contracts import UserError
from dino_lite.data.sources import digest
from dino_lite.planning.plan import open_splits
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.old_names import CLASSES, current
from dino_lite.runs.pretraining import run_pretrain
from dino_lite.runs.resume import check_data
from dino_lite.runs.run import Run
from images import fill

OLD = Path(__file__).parent / "old"
RUNS = sorted(path.name for path in (OLD / "runs").iterdir())
EXPORTS = sorted(path.name for path in (OLD / "exports").iterdir())


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """Images and the tokens of each run."""
    return load_file(OLD / "expected.safetensors")


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    shutil.copytree(OLD / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def continued(runs_dir: Path, name: str, *more: str) -> list[str]:
    """The command that began an old run, with its overrides and `more`."""
    words = load(runs_dir / name / "config.yaml")["overrides"]
    words = [word for word in words if not word.startswith(("runs_dir", "+callbacks.stop"))]
    return [*words, f"runs_dir={runs_dir}", *more]


def older_than(run: Path, key: str) -> dict[str, Any]:
    """Take a key out of the request that a run has saved; returns what is left of it."""
    file = run / "environment.json"
    environment: dict[str, Any] = json.loads(file.read_text())
    request: dict[str, Any] = environment["request"]
    del request[key]
    file.write_text(json.dumps(environment))
    return request


def assert_tokens(backbone: Any, name: str, expected: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        tokens = backbone(expected["images"])
    torch.testing.assert_close(tokens.cls, expected[f"{name}.cls"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens.patches, expected[f"{name}.patches"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_opens_with_its_tokens(name: str, expected: dict[str, torch.Tensor]) -> None:
    """For evaluate, export and report, which open it all alike."""
    opened = open_backbone(find_checkpoint(name, OLD / "runs"))
    assert_tokens(opened.backbone, name, expected)
    assert opened.image_size == 16


@pytest.mark.parametrize("name", EXPORTS)
def test_an_old_export_opens_with_its_tokens(name: str, expected: dict[str, torch.Tensor]) -> None:
    """By the Python interface and as a checkpoint."""
    assert_tokens(dino_lite.load_backbone(OLD / "exports" / name), name, expected)
    checkpoint = find_checkpoint(str(OLD / "exports" / name), "runs")
    assert checkpoint.kind == "export"
    assert_tokens(open_backbone(checkpoint).backbone, name, expected)


@pytest.mark.parametrize("name", ["dino_vit", "dino_convnet"])
def test_an_old_run_is_evaluated_and_exported_by_command(name: str, runs_dir: Path) -> None:
    """On its own data, which its configuration names."""
    words = [f"checkpoint={name}", f"runs_dir={runs_dir}"]
    measured = run_evaluate(compose("evaluate", [*words, "accelerator=cpu", "baselines=true"]))
    assert measured["knn"]["baselines"].keys() == {"raw pixels", "untrained"}
    assert run_export(compose("export", words))["safetensors"]["largest_difference"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dino_interrupted", "dinov2_interrupted"])
def test_an_old_interrupted_run_is_continued_to_the_end(
    name: str, runs_dir: Path, expected: dict[str, torch.Tensor]
) -> None:
    """By the command that began it and its name, to what it would have come to then."""
    results = run_pretrain(compose("pretrain", continued(runs_dir, name)))
    assert results["steps"] == 8
    backbone = open_backbone(find_checkpoint(name, runs_dir)).backbone
    with torch.no_grad():
        cls = backbone(expected["images"]).cls
    torch.testing.assert_close(cls, expected[f"{name}.finished"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("start", ["dinov2_interrupted", "dinov3_rope"])
def test_a_new_run_begins_with_an_old_one(start: str, runs_dir: Path) -> None:
    """With its backbone, heads and teacher."""
    old = load(runs_dir / start / "config.yaml")
    words = [word for word in old["overrides"] if not word.startswith(("runs_dir", "name", "+"))]
    words += [f"checkpoint={runs_dir / start}", f"runs_dir={runs_dir}", "trainer.max_steps=2"]
    words += ["optim.freeze_last_layer=0.0", "optim.learning_rate.warmup=0.0"]
    results = run_pretrain(compose("pretrain", words))
    assert results["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("start", ["dino_vit", "dinov3_rope"])
def test_an_old_export_is_a_start(start: str, runs_dir: Path) -> None:
    """`backbone.pretrained=` takes it."""
    old = load(runs_dir / start / "config.yaml")
    words = [word for word in old["overrides"] if not word.startswith(("runs_dir", "name", "+"))]
    words += [f"runs_dir={runs_dir}", f"backbone.pretrained={OLD / 'exports' / start}"]
    assert run_pretrain(compose("pretrain", words))["steps"] == 8


def test_a_default_that_has_changed_is_named_and_refused(runs_dir: Path) -> None:
    """With the way to continue: the old value and the run's name."""
    name = "dino_interrupted"
    file = runs_dir / name / "environment.json"
    environment = json.loads(file.read_text())
    environment["request"]["optim.clip"] = 2.5
    file.write_text(json.dumps(environment))
    with pytest.raises(
        UserError, match=rf"default of optim\.clip was 2\.5.*optim\.clip=2\.5 and name={name}"
    ):
        run_pretrain(compose("pretrain", continued(runs_dir, name)))


def test_a_key_that_the_saved_run_lacks_keeps_its_old_behavior(runs_dir: Path) -> None:
    """A run that is older than a key is continued; one that asks for the key is refused."""
    name = "dino_interrupted"
    older_than(runs_dir / name, "method.head.learn_norm")
    config = load(runs_dir / name / "config.yaml")
    del config["method"]["head"]["learn_norm"]
    save(config, runs_dir / name / "config.yaml")
    words = continued(runs_dir, name)
    with pytest.raises(UserError, match=r"learn_norm=absent, not True"):
        run_pretrain(compose("pretrain", [*words, "method.head.learn_norm=true"]))
    assert run_pretrain(compose("pretrain", words))["steps"] == 8


def test_old_names_are_replaced_wherever_they_stand() -> None:
    """Nested, in lists, by dotted key; today's names stay."""
    old, new = next(iter(CLASSES.items()))
    config = {"backbone": {"_target_": old}, "loss": {"koleo": {"reads": "koleo"}}, "a": [1]}
    wanted = put(put(config, "backbone._target_", new), "loss.koleo.reads", "tokens")
    assert current(config) == current(wanted) == wanted
    assert current({"backbone._target_": old, "loss.koleo.reads": "koleo"}) == {
        "backbone._target_": new,
        "loss.koleo.reads": "tokens",
    }
    assert current({"name": "koleo"}) == {"name": "koleo"}


def test_a_forgotten_override_is_not_called_a_default(runs_dir: Path) -> None:
    """It was asked for then, and is not now."""
    name = "dino_interrupted"
    words = [word for word in continued(runs_dir, name) if not word.startswith("seed=")]
    with pytest.raises(UserError, match=r"was started with seed=3, not 0: give the same settings"):
        run_pretrain(compose("pretrain", words))


def test_a_resumed_run_is_known_by_its_first_request(runs_dir: Path) -> None:
    """Keys that are newer than the run are not added to it."""
    name = "dino_interrupted"
    request = older_than(runs_dir / name, "optim.decay_tokens")
    run_pretrain(compose("pretrain", continued(runs_dir, name)))
    environment = json.loads((runs_dir / name / "environment.json").read_text())
    assert environment["request"] == request


def test_a_callback_that_was_removed_stays_removed(runs_dir: Path) -> None:
    """Callbacks are those of the command, none of the saved run's."""
    name = "dino_interrupted"
    run_pretrain(compose("pretrain", continued(runs_dir, name, "~callbacks.pictures")))
    saved = load(runs_dir / name / "config.yaml")
    assert {"pictures", "stop"} & saved["callbacks"].keys() == set()


@pytest.mark.parametrize(
    ("files", "before"),
    [
        (["train/a/1.png", "valid/a/2.png"], ["train/a/1.png", "valid/a/2.png"]),
        (["images/1.png", "masks/1.png"], ["images/1.png", "masks/1.png"]),
        (["train/1.png", "train/masks/1.png", "val/2.png"], ["1.png", "masks/1.png"]),
    ],
)
def test_data_that_this_version_reads_differently_is_not_called_changed(
    tmp_path: Path, files: list[str], before: list[str]
) -> None:
    """`before`: the paths whose digest an earlier version stored."""
    node = {"_target_": "dino_lite.data.folder.open_folder", "root": str(fill(tmp_path, *files))}
    card = {"num_images": len(before), "digest": digest([name.encode() for name in before])}
    with pytest.raises(UserError, match=r"the data is the same.* reads 1 image .*data\.exclude"):
        check_data(Run(tmp_path / "run"), card, node, open_splits(node))
    (tmp_path / files[0]).unlink()
    fill(tmp_path, "train/new.png")
    with pytest.raises(UserError, match="the data has changed"):
        check_data(Run(tmp_path / "run"), card, node, open_splits(node))
