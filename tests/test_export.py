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
from dino_lite.formats import safetensors
from dino_lite.formats.safetensors import export_safetensors, load_backbone, read_config


def vit(**kwargs: Any) -> ViT:
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return ViT(**sizes | kwargs)


def write(backbone: ViT, folder: Path, size: int = 32) -> dict[str, Any]:
    return export_safetensors(
        backbone,
        folder,
        normalize_mean=[0.5, 0.4, 0.3],
        normalize_std=[0.2, 0.2, 0.2],
        image_size=size,
        card={"run": "test"},
        images=torch.randn(3, 3, size, size),
    )


@pytest.mark.parametrize("size", [32, 48])
def test_an_exported_backbone_comes_back_the_same(tmp_path: Path, size: int) -> None:
    """Same weights, same tokens at any size, in eval mode; what was written is told."""
    backbone = vit(drop_path=0.5, position_offset=0.1, position_antialias=False).train()
    told = write(backbone, tmp_path / "new" / "folder", size)
    loaded = load_backbone(told["directory"])
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(images).patches, backbone.eval()(images).patches)
    assert told["largest_difference"] == 0.0
    assert not loaded.training
    assert sorted(path.name for path in Path(told["directory"]).iterdir()) == sorted(told["files"])


def test_config_says_what_is_needed_to_use_the_backbone(tmp_path: Path) -> None:
    """Spec, sizes, normalization, version and card are plain JSON."""
    write(vit(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["spec"]["embed_dim"] == config["embed_dim"] == 16
    assert (config["patch_size"], config["in_chans"], config["image_size"]) == (8, 3, 32)
    assert (config["mean"], config["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
    assert (config["version"], config["card"]) == (dino_lite.__version__, {"run": "test"})
    assert read_config(tmp_path) == config


def test_the_exported_network_is_left_as_it_was(tmp_path: Path) -> None:
    """Modes and gradients of the teacher in memory are its own."""
    backbone = vit().train()
    backbone.blocks[0].eval()
    before = {name: part.training for name, part in backbone.named_modules()}
    write(backbone, tmp_path)
    assert {name: part.training for name, part in backbone.named_modules()} == before


def test_float64_weights_stay_float64(tmp_path: Path) -> None:
    """Nothing is rounded on the way out or in."""
    assert write(vit().double(), tmp_path)["largest_difference"] == 0.0
    assert next(load_backbone(tmp_path).parameters()).dtype == torch.float64


def test_a_spec_that_rebuilds_another_network_is_found(tmp_path: Path) -> None:
    """The files are compared with the teacher, not with themselves."""
    backbone = vit()
    backbone.spec["position_offset"] = 0.7
    with pytest.raises(RuntimeError, match="differs"):
        write(backbone, tmp_path, size=48)


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    """The same folder may be written again."""
    write(vit(), tmp_path)
    other = vit()
    write(other, tmp_path)
    assert torch.equal(load_backbone(tmp_path).cls_token, other.cls_token)


def test_an_interrupted_export_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk halfway through is a sentence, and the files that were there still load."""
    former = vit()
    write(former, tmp_path)

    def half(weights: dict[str, torch.Tensor], path: Path, **kwargs: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors, "save_file", half)
    with pytest.raises(UserError, match="No space left"):
        write(vit(), tmp_path)
    assert torch.equal(load_backbone(tmp_path).cls_token, former.cls_token)
    assert len(list(tmp_path.iterdir())) == 2


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
    write(vit(), tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=words):
        load_backbone(tmp_path)


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    """A wrong path names itself."""
    with pytest.raises(UserError, match="There is no folder"):
        load_backbone(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        write(vit(), tmp_path / "file")


def test_the_package_offers_its_functions_without_loading_torch() -> None:
    """`import dino_lite` is quick; unknown names fail as they do in any module."""
    code = (
        "import sys, dino_lite; assert 'torch' not in sys.modules; dino_lite.__version__;"
        "assert 'load_backbone' in dir(dino_lite); assert not hasattr(dino_lite, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dino_lite.load_backbone is load_backbone
