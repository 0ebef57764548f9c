"""Every configuration composes; every experiment builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_lite.commands.evaluate import build_evaluations
from dino_lite.commands.pretrain import build, build_module
from dino_lite.config import compose, config_dir, get, leaves
from dino_lite.contracts import Evaluation, UserError
from dino_lite.machine import Facts
from dino_lite.plan import plan
from dino_lite.runs import Run

EVALUATIONS = sorted(path.stem for path in (config_dir() / "eval").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
GROUPS = sorted(
    f"{folder.name}={path.stem}"
    for folder in config_dir().iterdir()
    if folder.is_dir() and folder.name not in ("experiment", "eval", "format")
    for path in folder.glob("*.yaml")
)


def facts(**changes: object) -> Facts:
    """A laptop with a folder of photographs."""
    usual = {
        "source": "photos",
        "num_images": 5000,
        "num_test": 0,
        "num_classes": 0,
        "height": 300,
        "width": 400,
        "channels": 3,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
        "accelerator": "cpu",
        "device_name": "cpu",
        "num_devices": 1,
        "num_cores": 4,
        "bf16": False,
    }
    return Facts(**(usual | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", GROUPS)
def test_every_choice_of_every_group_composes_and_plans(choice: str) -> None:
    """No configuration file is dead or broken, alone with the defaults; losses with the method that
    is called as they are.
    """
    group, _, name = choice.partition("=")
    beside = [f"method={name}"] if group == "loss" else []
    planned = plan(compose("pretrain", [choice, *beside]), facts())
    assert not [
        key
        for key, value in leaves(planned.config)
        if value == "auto" and key not in ("name", "data.labels")
    ]


def test_keys_that_a_method_does_not_take_are_a_sentence() -> None:
    """Another method's, before anything is built."""
    config = compose("pretrain", ["+method.gram=null"])
    with pytest.raises(UserError, match=r"^method\.gram: there is no such key; known are"):
        plan(config, facts())


@pytest.mark.parametrize("choice", ["adamw", "sgd", "lars"])
def test_every_optimizer_takes_what_optim_says(choice: str) -> None:
    """Each builds over the same groups, which have the factors and marks that were asked for."""
    settings = {"layer_decay": 0.5, "patch_embed_scale": 0.2, "freeze_by": "rate"}
    settings |= {"decay_tokens": True, "clip_by": "module"}
    overrides = [f"optim.{key}={value}" for key, value in settings.items()]
    asked = ["backbone=vit", f"optim={choice}", *overrides]
    config = plan(compose("pretrain", asked), facts()).config
    step = build_module(config, facts()).bare_step()
    assert type(step.optimizer).__name__.lower() == choice
    found = {name: group for group in step.optimizer.param_groups for name in group["names"]}
    depth = get(config, "backbone.depth")
    patches = found["backbone.patch_embed.proj.weight"]
    assert patches["rate_scale"] == pytest.approx(0.2 * 0.5 ** (depth + 1))
    assert found["backbone.cls_token"]["decay"]
    assert [name for name, group in found.items() if group["last_layer"]] == [
        "head.last_layer.weight_v"
    ]
    assert len(step.clip_groups) == 2


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_evaluation_builds(name: str) -> None:
    """Each file holds one, under its own name, with settings that it takes."""
    root = [f"eval.{name}.root=masks"] if name == "segmentation" else []  # it has no default
    evaluations = build_evaluations(compose("evaluate", [f"eval=[{name}]", *root]))
    assert list(evaluations) == [name]
    assert isinstance(evaluations[name], Evaluation)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds(experiment: str, tmp_path: Path) -> None:
    """Each experiment composes, plans and gives data, method and optimizer step on the embedded
    set.
    """
    from dino_lite.data.shapes import open_shapes

    config = plan(
        compose("pretrain", [f"experiment={experiment}", "trainer.accelerator=cpu"]), facts()
    ).config
    splits = open_shapes(num_train=20, num_test=10)
    datamodule, module, callbacks = build(config, facts(num_images=20), splits, Run(tmp_path))
    assert datamodule.batch_size == config["loader"]["batch_size"]
    assert (module.clock.num_steps is None) != (module.clock.max_seconds is None)
    assert callbacks
    assert module.configure_optimizers().param_groups[0]["decay"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_states_command_machine_time_and_result(experiment: str) -> None:
    """The header of a recipe says how to run it, on what, how long, and what to expect."""
    head = (config_dir() / "experiment" / f"{experiment}.yaml").read_text()
    for word in ("dino-lite pretrain", "machine:", "time:", "result:"):
        assert word in head, word


@pytest.mark.parametrize("primary", ["pretrain", "evaluate", "export", "compare", "report"])
def test_hydra_writes_nothing_of_its_own(primary: str) -> None:
    """No output folder, no log file, no change of folder."""
    text = (config_dir() / f"{primary}.yaml").read_text()
    assert "output_subdir: null" in text
    assert "run: {dir: .}" in text
    assert "chdir: false" in text


def test_compat_changes_only_the_switches() -> None:
    """compat=dino differs from the defaults in the switches of the table, and in nothing else."""
    ours, theirs = (
        dict(leaves(compose("pretrain", []))),
        dict(leaves(compose("pretrain", ["compat=dino"]))),
    )
    changed = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert changed - {"compat", "overrides"} == {
        "augment.where",
        "loader.draft",
        "backbone.position_offset",
        "backbone.position_antialias",
        "method.momentum.end_reached",
        "method.teacher_temp.per",
        "optim.learning_rate.end_reached",
        "optim.weight_decay.end_reached",
        "optim.decay_tokens",
        "optim.clip_by",
    }


def test_configuration_of_a_plain_run_holds_the_papers_numbers() -> None:
    """Published parameters (Caron et al. 2021, section 3.2 and appendix) are the defaults."""
    config = compose("pretrain", [])
    published = {
        "optim.weight_decay.base": 0.04,
        "optim.weight_decay.end": 0.4,
        "optim.learning_rate.end": 1e-6,
        "method.center_momentum": 0.9,
        "method.teacher_temp.start": 0.04,
        "loss.dino.student_temp": 0.1,
    }
    assert {key: get(config, key) for key in published} == published
