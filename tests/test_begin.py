"""Runs that begin with the weights of another run: what is taken over, what is not, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.vit import ViT
from dino_lite.config import Config, compose, put, save
from dino_lite.contracts import UserError
from dino_lite.methods.dinov2 import DINOv2
from dino_lite.planning.checks import check_values
from dino_lite.planning.plan import plan
from dino_lite.runs.begin import begin_config, build_method
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.pretraining import run_pretrain
from test_conf import facts
from tiny import TINY, checkpoint, exported, tiny


@pytest.mark.parametrize("compact", [False, True])
def test_the_export_of_a_convnet_brings_its_network(tmp_path: Path, compact: bool) -> None:
    """A bare command may have chosen that network; settings of another one are refused."""
    own = ConvNet(widths=[16, 32], depths=[1, 1], patch_size=4, norm="group", fields=1)
    out = exported(Compact(own, 4) if compact else own, tmp_path / "out", 8)
    words = ["data=shapes", f"backbone.pretrained={out}", "augment.global_size=16"]
    config = begin_config(check_values(compose("pretrain", words)))
    assert config["backbone"]["in_chans"] == "auto"
    config = plan(config, facts(source="photos")).config
    method = build_method(config)
    assert method.export_backbone().stored_spec() == own.stored_spec()
    begun = method.export_backbone().state_dict()
    assert all(torch.equal(begun[name], value) for name, value in own.state_dict().items())
    config = plan(
        begin_config(check_values(compose("pretrain", [*words, "backbone=vit"]))), facts()
    )
    with pytest.raises(
        UserError, match=r"is the export of a backbone of kind (convnet|compact), not of a ViT"
    ):
        build_method(config.config)


def second(runs_dir: Path, run: Path | str, *overrides: str) -> Config:
    """The configuration of high-resolution adaptation, tiny, of that run."""
    words = ["data=shapes", "experiment=highres_adapt", f"checkpoint={run}", *overrides]
    config = compose("pretrain", words)
    for key, value in TINY.items():
        if not key.startswith(("backbone", "method", "augment")):
            config = put(config, key, value)
    sizes = {"global_size": 32, "local_size": 16, "num_local": 2, "gram_size": 48}
    for key, value in sizes.items():
        config = put(config, f"augment.{key}", value)
    config = put(config, "optim.learning_rate.warmup", 0.5)
    return put(config, "runs_dir", str(runs_dir))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DINOv2 on crops of 16 pixels."""
    runs_dir = tmp_path_factory.mktemp("runs")
    config = compose("pretrain", ["data=shapes", "method=dinov2"])
    for key, value in TINY.items():
        config = put(config, key, value)
    config = put(config, "name", "first")
    return Path(run_pretrain(put(config, "runs_dir", str(runs_dir)))["run"])


@pytest.mark.slow
def test_high_resolution_adaptation_goes_on_where_the_run_stood(first: Path) -> None:
    """Larger crops and a Gram teacher on larger ones still; nothing but the run has to be named."""
    config = second(first.parent, first, "name=second")
    results = run_pretrain(config)
    assert (results["finished"], results["steps"]) == (True, 8)
    opened = open_backbone(find_checkpoint(results["run"], "runs"))
    backbone = opened.backbone
    assert opened.image_size == 32
    assert backbone.embed_dim == TINY["backbone.embed_dim"]
    lines = (Path(results["run"]) / "metrics.csv").read_text().splitlines()
    assert "gram" in lines[0].split(",")


@pytest.mark.slow
def test_weights_are_those_of_the_run(first: Path) -> None:
    """Student, heads and teacher as they were, the count of steps not; the Gram teacher is the
    teacher; positions come to the new grid.
    """
    config = begin_config(second(first.parent, first))
    for key, value in {"backbone.image_size": 32, "backbone.drop_path": 0.0}.items():
        config = put(config, key, value)
    config = put(config, "method.momentum.end", 0.999)
    method = build_method(config)
    assert isinstance(method, DINOv2)
    assert method.gram is not None
    assert int(method.step) == 0
    before = checkpoint(first)["state_dict"]
    for name, value in method.state_dict().items():
        if name.endswith("pos_embed"):
            assert value.shape == (1, 17, TINY["backbone.embed_dim"])
        elif not name.startswith(("step", "teachers.gram")):
            torch.testing.assert_close(value, before[f"method.{name}"])
    gram, teacher = method.gram.module.state_dict(), method.export_backbone().state_dict()
    assert all(torch.equal(gram[name], value) for name, value in teacher.items())
    learned = before["method.teachers.ema.module.backbone.pos_embed"][:, 1:]
    small = ViT(image_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    wanted = small.resample(learned.reshape(1, 2, 2, -1), (4, 4))
    torch.testing.assert_close(teacher["pos_embed"][:, 1:], wanted)


def test_what_cannot_be_begun_with_is_refused(first: Path, tmp_path: Path) -> None:
    """In a sentence: the latest run, weights of a backbone alone, another method's run."""
    with pytest.raises(UserError, match="without checkpoint="):
        begin_config(put(second(first.parent, first), "checkpoint", None))
    with pytest.raises(UserError, match="checkpoint=latest: name the run"):
        begin_config(second(first.parent, "latest"))
    alone = tmp_path / "alone.pth"
    torch.save({"cls_token": torch.zeros(1)}, alone)
    with pytest.raises(UserError, match=r"backbone\.pretrained="):
        begin_config(second(first.parent, alone))
    with pytest.raises(UserError, match="is not a run"):
        begin_config(second(first.parent, tmp_path / "absent"))
    with pytest.raises(UserError, match=r"is a run of dino_lite\.methods\.dinov2"):
        run_pretrain(tiny(tmp_path, f"checkpoint={first}"))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of DINO with a ViT of depth 6; its checkpoint is never read."""
    run = tmp_path_factory.mktemp("runs") / "earlier"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    sizes = {"name": "vit", "embed_dim": 192, "depth": 6, "num_heads": 6, "patch_size": 8}
    heads = {"num_prototypes": 512, "hidden_dim": 256, "bottleneck_dim": 64}
    config = compose("pretrain", ["backbone=vit", "backbone.depth=6"])
    config["backbone"] |= sizes | {"in_chans": 3, "image_size": 64, "drop_path": 0.1}
    config["method"]["head"] |= heads
    save(config, run / "config.yaml")
    return run


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("backbone.depth=4", "backbone.depth=4 (the run: 6)"),
        (
            "++backbone.depth=4 backbone.mlp='swiglu'",
            "backbone.mlp=swiglu (the run: the network's own)",
        ),
        ("backbone=vit_tiny", "differ from backbone=vit_tiny (the run: vit): leave"),
        ("backbone=resnet18 backbone.norm=group", "differ from backbone=resnet18 (the run: vit): "),
        (
            "method.head.num_prototypes=64 method.center_momentum=0.5",
            "method.center_momentum=0.5 (the run: 0.9)",
        ),
        ("compat=dinov2 method=dino", "backbone.position_offset=0.1 by compat=dinov2 (the run: 0"),
        (
            "experiment=dino_vit_small_imagenet",
            "vit_small_patch16_224 by experiment=dino_vit_small_imagenet (the run: vit)",
        ),
    ],
)
def test_what_differs_from_the_run_begun_with_is_refused(
    earlier: Path, words: str, named: str
) -> None:
    """By key and both values, however it was asked for, and nothing else is named."""
    config = compose("pretrain", [f"checkpoint={earlier}", *words.split()])
    with pytest.raises(UserError, match="leave these settings out") as caught:
        begin_config(config)
    assert named in str(caught.value)
    assert "augment" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "backbone.depth=6 backbone.name='vit' ++method.head.num_prototypes=512",
        "backbone=vit",
        "backbone.depth=auto preset=large backbone.drop_path=0.3 backbone.image_size=128",
        "method=dino trainer.max_steps=3 optim.rate=1e-4 augment.num_local=2",
    ],
)
def test_what_agrees_with_the_run_begun_with_passes(earlier: Path, words: str) -> None:
    """The run's own values, and settings that a new run chooses freely."""
    begun = begin_config(compose("pretrain", [f"checkpoint={earlier}", *words.split()]))
    assert begun["backbone"]["depth"] == 6
    assert begun["method"]["head"]["num_prototypes"] == 512
