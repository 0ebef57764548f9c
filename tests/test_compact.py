"""Class tokens of fewer numbers: what is kept, stored and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dino_lite
from dino_lite.backbones.compact import compacted
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.spec import build_backbone
from dino_lite.commands.export import export
from dino_lite.contracts import Backbone, UserError
from dino_lite.eval.baselines import untrained
from pooled import small_vit
from tiny import train


def pyramid() -> ConvNet:
    """A small convolutional network with 8 · 2² + 4 · 4² = 96 numbers."""
    return ConvNet(widths=[4, 8], depths=[1, 1], patch_size=4, fields=2, norm="group").eval()


def tokens_of(backbone: Backbone, num: int = 40) -> torch.Tensor:
    """Class tokens of noise."""
    images = torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone(images).cls


@pytest.mark.parametrize("backbone", [pyramid(), small_vit().eval()])
def test_all_components_keep_every_cosine(backbone: Backbone) -> None:
    """Fewer keep them nearly; patches are those of the whole network."""
    whole = tokens_of(backbone, 400)
    rank = int(torch.linalg.matrix_rank((whole - whole.mean(dim=0)).double(), rtol=1e-5))
    compact = compacted(backbone, whole, rank)
    few = tokens_of(compact, 400)
    assert few.shape == (400, rank) == (400, compact.embed_dim)
    centered = (part - part.mean(dim=0) for part in (whole, few))
    first, second = (part @ part.T for part in centered)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(compact(images).patches, backbone(images).patches)
    assert (
        compact(images, cls_only=True).patches.shape[1]
        == backbone(images, cls_only=True).patches.shape[1]
    )


def test_whitened_tokens_of_the_training_set_have_unit_covariance() -> None:
    """And mean 0."""
    backbone = pyramid()
    few = tokens_of(compacted(backbone, tokens_of(backbone), 10, whiten=True))
    torch.testing.assert_close(few.mean(dim=0), torch.zeros(10), rtol=0, atol=1e-4)
    torch.testing.assert_close(few.T @ few / len(few), torch.eye(10), rtol=0, atol=1e-3)


def test_more_numbers_than_directions_are_a_sentence() -> None:
    """Forty images vary in 39 directions at most."""
    backbone = pyramid()
    with pytest.raises(UserError, match=r"compact=40: .* 40 training images vary in 39 directions"):
        compacted(backbone, tokens_of(backbone), 40)


def test_a_compact_network_is_an_ordinary_module() -> None:
    """It is rebuilt from its spec, and exported by torch; its untrained baseline is whole."""
    backbone = small_vit().eval()
    compact = compacted(backbone, tokens_of(backbone), 8)
    images = torch.randn(2, 3, 16, 16)
    again = build_backbone(json.loads(json.dumps(compact.stored_spec()))).eval()
    again.load_state_dict(compact.state_dict())
    assert torch.equal(again(images).cls, compact(images).cls)
    exported = torch.export.export(compact, (images,)).module()
    torch.testing.assert_close(exported(images).cls, compact(images).cls)
    assert untrained(compact).embed_dim == backbone.embed_dim
    assert compact.depth_of("reduce.weight") == backbone.num_blocks + 1
    assert compact.depth_of("whole.blocks.0.norm1.weight") == 1


@pytest.mark.slow
def test_an_export_says_its_sizes_and_may_be_compact(tmp_path: Path) -> None:
    """The whole export stays beside it; what cannot be is a sentence."""
    words = [
        f"checkpoint={train(tmp_path / 'runs', 'trainer.max_steps=2')}",
        f"runs_dir={tmp_path / 'runs'}",
    ]
    folder = Path(export(*words)["safetensors"]["directory"])
    whole = dino_lite.load_backbone(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_parameters"] == sum(p.numel() for p in whole.parameters())
    assert (config["embed_dim"], config["patch_dim"]) == (32, 32)
    found = export(*words, "compact=12", "whiten=true")["safetensors"]
    assert Path(found["directory"]) == folder.with_name("safetensors_12_whitened")
    assert found["largest_difference"] <= 1e-5
    images = torch.randn(2, 3, 16, 16)
    tokens = dino_lite.load_backbone(found["directory"])(images)
    assert tokens.cls.shape == (2, 12)
    assert torch.equal(tokens.patches, whole(images).patches)
    again = dino_lite.evaluate(
        f"checkpoint={found['directory']}",
        "data=shapes",
        "data.num_train=44",
        "data.num_test=20",
        "features_dir=null",
    )
    assert again["knn"]["num_train"] == 44
    for width in ("32", "half"):
        with pytest.raises(UserError, match=f"compact={width}: it must be an integer from 1 to 31"):
            export(*words, f"compact={width}")
