"""`backbone=NAME` with the name of a timm model: which networks it builds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_lite.backbones.named import choice_for
from dino_lite.config import Config, command, compose
from dino_lite.contracts import UserError


def backbone(*overrides: str) -> Config:
    node: Config = compose("pretrain", [*overrides])["backbone"]
    return node


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("convnext_atto", "convnext_tiny"),
        ("resnet18", "resnet50"),
        ("vit_small_patch14_dinov2", "vit_small"),
        ("vit_small_plus_patch16_dinov3", "vit_small_dinov3"),
    ],
)
def test_a_timm_name_is_a_choice_with_the_settings_of_its_kind(name: str, like: str) -> None:
    """As where conf/ has a file for it; the settings can be given beside it."""
    expected = backbone(f"backbone={like}") | {"name": name, "patch_size": 16}
    assert backbone("backbone.patch_size=16", f"backbone={name}", "seed=1") == expected


def test_files_come_first_and_may_name_a_timm_model(tmp_path: Path) -> None:
    """A user's own backbone/resnet18.yaml is not timm's; an experiment may choose resnet26."""
    for group, text in {
        "backbone/resnet18": "defaults: [vit, _self_]\ndepth: 3\n",
        "experiment/mine": "# @package _global_\ndefaults:\n  - override /backbone: resnet26\n",
    }.items():
        file = tmp_path / f"{group}.yaml"
        file.parent.mkdir()
        file.write_text(text)
    search = f"hydra.searchpath=['file://{tmp_path}']"
    assert backbone("backbone=resnet18")["name"] == "resnet18"  # makes timm's known
    assert backbone(search, "backbone=resnet18")["name"] == "vit"
    assert backbone(search, "experiment=mine")["name"] == "resnet26"


@pytest.mark.slow
def test_every_job_of_a_sweep_may_name_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command line runs it, also where a job composes something else."""
    seen: list[str] = []

    def job(config: Config) -> None:
        seen.append(config["backbone"]["name"])
        compose("pretrain", ["backbone=resnet18"])

    sweep = ["--multirun", "backbone=resnet18,vit_tiny", f"runs_dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["dino-lite", *sweep])
    main = command("pretrain")(job)
    main()
    assert seen == ["resnet18", "vit_tiny_patch16_224"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("convnext_smal", "no timm model of that name; did you mean convnext_small?"),
        ("vit_smal", "did you mean vit_small?"),
        ("resnet51", "did you mean resnet50?"),
        ("zzz", "choose one of auto, convnet, "),
        ("convnext", "did you mean convnext_tiny?"),
        ("deit_smal", "did you mean deit_small_patch16_224?"),
        ("swin_tiny_patch4_window7_224", "Nets and ConvNeXts are supported; choose one of auto, "),
        ("swin_tiny", "only plain ViTs with a class token, DINOv3's ViTs, ResNets and ConvNeXts a"),
        ("regnety_032", "ResNets and ConvNeXts are supported; choose one of auto, "),
        ("vit_small_patch16_18x2_22", "did you mean vit_small_patch16_"),
        ("resnet18.a1_in1k", ": .a1_in1k names weights, but a network is chosen without: write ba"),
        ("timm:resnet18", ": write backbone=resnet18; backbone.pretrained=FILE starts from weigh"),
        ("timm:convnext_small", ": write backbone=convnext_small; backbone.pretrained=FILE sta"),
        ("timm:vit_small_patch16_224", "16_224; backbone.pretrained=FILE starts from weights in a"),
        ("~/weights.pth", "write backbone.pretrained=~/weights.pth."),
    ],
)
def test_other_names_are_answered_with_what_there_is(name: str, said: str) -> None:
    """Only what can be built is suggested."""
    with pytest.raises(UserError) as caught:
        compose("pretrain", [f"backbone={name}"])
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"backbone={name}: ")


def test_a_model_of_another_kind_is_none_of_ours() -> None:
    """A pooled ViT without a class token, a distilled one, a hybrid."""
    for name in (
        "vit_wee_patch16_reg1_gap_256",
        "deit_tiny_distilled_patch16_224",
        "mixer_s32_224",
    ):
        assert choice_for(name) is None, name
