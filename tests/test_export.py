"""An export is the backbone, whole, and everything wrong with one is a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dino_lite
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError
from dino_lite.formats.safetensors import load_backbone, read_config
from tiny import exported


def vit(**kwargs: Any) -> ViT:
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return ViT(**sizes | kwargs)


@pytest.mark.parametrize("size", [32, 48])
def test_an_exported_backbone_comes_back_the_same(tmp_path: Path, size: int) -> None:
    """Same weights, same tokens at any size, in eval mode."""
    backbone = vit(drop_path=0.5, position_offset=0.1, position_antialias=False)
    loaded = load_backbone(exported(backbone, tmp_path / "new", size))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(images).patches, backbone(images).patches)
    assert not loaded.training


def test_config_says_what_is_needed_to_use_the_backbone(tmp_path: Path) -> None:
    """Spec, sizes, normalization, version and card are plain JSON."""
    exported(vit(), tmp_path, run="test")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["spec"]["embed_dim"] == config["embed_dim"] == config["patch_dim"] == 16
    assert (config["patch_size"], config["in_chans"], config["image_size"]) == (8, 3, 32)
    assert (config["mean"], config["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
    assert (config["version"], config["card"]) == (dino_lite.__version__, {"run": "test"})
    assert read_config(tmp_path) == config


def test_float64_weights_stay_float64(tmp_path: Path) -> None:
    """Nothing is rounded on the way out or in."""
    backbone = vit().double()
    again = load_backbone(exported(backbone, tmp_path))
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(again(images).cls, backbone(images).cls)


def damage_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


DEEPER = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text('{"format"'), "cannot be read"),
        (
            lambda folder: (folder / "config.json").write_text("[1]"),
            "cannot be read: it holds a list",
        ),
        (damage_weights, "damaged"),
        (change_config(format="something else"), "not the config"),
        (change_config(mean=None, spec=None), "lacks spec, mean"),
        (change_config(spec=DEEPER), "does not fit"),
        (change_config(spec={"nonsense": 1}), "nonsense=1, which no vit has"),
    ],
)
def test_a_damaged_export_is_a_sentence(
    tmp_path: Path, harm: Callable[[Path], Any], words: str
) -> None:
    """Missing, truncated, foreign and mismatched files are told apart."""
    exported(vit(), tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=words):
        load_backbone(tmp_path)


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    """A wrong path names itself."""
    with pytest.raises(UserError, match="There is no folder"):
        load_backbone(tmp_path / "nowhere")


def test_the_package_offers_its_functions_without_loading_torch() -> None:
    """`import dino_lite` is quick; unknown names fail as they do in any module."""
    code = (
        "import sys, dino_lite; assert 'torch' not in sys.modules; dino_lite.__version__;"
        "assert 'load_backbone' in dir(dino_lite); assert not hasattr(dino_lite, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dino_lite.load_backbone is load_backbone
