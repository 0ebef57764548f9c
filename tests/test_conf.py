"""Every configuration composes; every experiment builds."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dino_lite.config import compose, config_dir, get, leaves, load
from dino_lite.contracts import Evaluation, Progress, UserError
from dino_lite.machine import Facts
from dino_lite.methods.module import PretrainModule
from dino_lite.methods.retention import Retention
from dino_lite.methods.student import OF_MASKED, OF_WHOLE
from dino_lite.planning.plan import plan
from dino_lite.runs.build import build, build_module
from dino_lite.runs.run import Run
from dino_lite.runs.subject import build_evaluations
from test_dino import random_crops


def choices(group: str) -> list[str]:
    """The files of conf/GROUP."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


EVALUATIONS, EXPERIMENTS, LOSSES, METHODS = map(choices, ("eval", "experiment", "loss", "method"))
METHODS.remove("distill")  # needs a teacher: test_distillation.py
PRIMARIES = sorted(path.stem for path in config_dir().glob("*.yaml") if path.stem != "base")
GROUPS = sorted(
    f"{folder.name}={path.stem}"
    for folder in config_dir().iterdir()
    if folder.is_dir() and folder.name not in ("experiment", "eval", "format", "loss")
    for path in folder.glob("*.yaml")
    if path.stem != "distill"  # needs a teacher
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
    """No configuration file is dead or broken, alone with the defaults."""
    planned = plan(compose("pretrain", [choice]), facts())
    assert not [
        key
        for key, value in leaves(planned.config)
        if value == "auto" and key not in ("name", "data.labels")
    ]


SMALL = ["embed_dim=16", "depth=1", "num_heads=1", "patch_size=4", "drop_path=0.0"]
SMALL = [f"backbone.{size}" for size in SMALL] + ["augment.global_size=16", "augment.local_size=8"]
WITH = {
    "dino": ["backbone=vit"],
    "simdino": ["backbone=vit"],
    "dinov3": ["method.gram.start_step=0"],
}
FILES = {loss: load(config_dir() / "loss" / f"{loss}.yaml") for loss in LOSSES}


@functools.cache
def small_module(method: str, *overrides: str) -> PretrainModule:
    """A small network of that method, ready for a step."""
    words = [f"method={method}", *WITH.get(method, []), *SMALL, *overrides]
    words += ["trainer.max_steps=2", "trainer.max_time=null", "trainer.compile=false"]
    known = facts(height=16, width=16)
    return build_module(plan(compose("pretrain", words), known).config, known)


@pytest.mark.parametrize("method", METHODS)
def test_losses_go_with_every_method_that_provides_what_they_read(method: str) -> None:
    """A step computes all of them beside the method's own."""
    provided = small_module(method).method.provides
    names = [loss for loss in LOSSES if FILES[loss][loss].get("reads") in provided]
    step = small_module(method, f"+loss=[{','.join(names)}]").bare_step()
    scalars = step(random_crops(), Progress(0, 2, 1))
    assert all(scalars[name].isfinite() for name in names)


def test_every_loss_goes_with_a_method() -> None:
    """Each file of conf/loss holds one, under its own name, and some method provides its match, or
    retention does; a penalty reads none.
    """
    provided = {name for method in METHODS for name in small_module(method).method.provides}
    provided |= OF_WHOLE | OF_MASKED  # of distillation
    provided |= {*Retention.provides, None}
    for loss, file in FILES.items():
        assert list(file) == [loss]
        assert file[loss].get("reads") in provided


def test_losses_are_a_list_as_evaluations_are() -> None:
    """A list replaces the method's own, `+` adds to it, `~` takes one away, and keys of each are
    overridden, beside an experiment too.
    """
    losses = functools.partial(lambda *words: compose("pretrain", list(words))["loss"])
    assert list(losses("method=dinov2")) == ["dino", "ibot", "koleo"]
    assert list(losses("method=dinov2", "loss=[dino,koleo]")) == ["dino", "koleo"]
    assert list(losses("experiment=dinov2_shapes", "loss=[ibot,koleo]")) == ["ibot", "koleo"]
    assert list(losses("method=dinov2", "+loss=[gram]")) == ["dino", "ibot", "koleo", "gram"]
    assert list(losses("method=dinov2", "~loss.koleo")) == ["dino", "ibot"]
    changed = losses("method=dinov2", "loss.koleo.weight.value=0.2")
    assert changed["koleo"]["weight"]["value"] == 0.2
    assert list(losses("loss=dino")) == ["dino"]


def test_keys_that_a_method_does_not_take_are_a_sentence() -> None:
    """Another method's, before anything is built."""
    config = compose("pretrain", ["+method.gram=null"])
    with pytest.raises(UserError, match=r"^method\.gram: there is no such key; choose one of"):
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


@pytest.mark.slow
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


@pytest.mark.parametrize("primary", PRIMARIES)
def test_hydra_writes_nothing_of_its_own(primary: str) -> None:
    """No output folder, no log file, no change of folder; sweeps below runs_dir; unknown keys are
    refused.
    """
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = hydra.compose(primary, return_hydra_config=True)
    assert OmegaConf.is_struct(config)
    given = config.hydra
    assert (given.run.dir, given.output_subdir, given.job.chdir) == (".", None, False)
    assert given.sweep.dir == "runs/.sweep"
    assert not {"handlers", "loggers"} & {*given.job_logging, *given.hydra_logging}


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


@pytest.fixture
def counter(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/count_settings.py."""
    monkeypatch.syspath_prepend(root / "scripts")
    return importlib.import_module("count_settings")


def test_a_setting_is_repeated_where_another_file_has_its_key_and_value(
    counter: ModuleType, tmp_path: Path
) -> None:
    """Folders below count; defaults lists do not, but a key `defaults` deeper down does."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.yaml").write_text("x: {y: 1, z: [1, 2]}\nw: 3\n")
    (tmp_path / "b.yaml").write_text("defaults: [base/a]\nx: {y: 1, z: [1, 3], defaults: 2}\n")
    (tmp_path / "c.yaml").write_text("# nothing\n")
    found = counter.count(tmp_path)
    assert (found["num"], found["num_repeated"], found["share"]) == (6, 2, 1 / 3)
    assert found["repeated"] == {"x.y=1": ["b.yaml", "base/a.yaml"]}


def test_few_settings_of_the_experiments_are_repeated(counter: ModuleType) -> None:
    """What several recipes share stands in conf/experiment/base."""
    found = counter.count(config_dir() / "experiment")
    assert 0 < found["share"] <= 0.2, found["repeated"]
