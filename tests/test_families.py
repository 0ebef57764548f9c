"""ViTs whose names several programs share: their grid, whose they are, their owners' tokens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dino_lite.backbones.vit import ViT
from dino_lite.config import compose
from dino_lite.contracts import UserError
from dino_lite.formats.weights import load_pretrained, open_weights
from dino_lite.planning.checks import check_values
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from test_importers import as_hugging_face_vit, saved, with_config
from test_rope import joined
from test_vit import images, randomize

Weights = dict[str, Tensor]
SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 16}
HEADS = {"num_heads": 2}


def theirs(img_size: Any = 32, **settings: Any) -> Any:
    """timm's model with generic weights, in float64, for any image size."""
    args = SIZES | {"num_classes": 0, "dynamic_img_size": True} | settings
    model = VisionTransformer(img_size=img_size, **args).double().eval()
    randomize(model)
    return model


def difference(opened: Any, wanted: Callable[[Tensor], Tensor], size: tuple[int, int]) -> float:
    """Largest difference of all tokens, in float64."""
    x = images(*size)
    with torch.no_grad():
        return float((joined(opened.backbone.double()(x)) - wanted(x)).abs().max())


# ------------------------------------------------------------------------------------ grids

OBLONG: dict[str, dict[str, Any]] = {
    "model_args": {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": [192, 224]}},
    "input_size": {"pretrained_cfg": {"input_size": [3, 192, 224]}},
    "image_size": {"image_size": [192, 224]},
    "height and width": {"image_size": {"height": 192, "width": 224}},
}


@pytest.mark.parametrize("form", OBLONG)
@pytest.mark.parametrize("settings", [{}, {"reg_tokens": 2, "no_embed_class": True}])
def test_an_oblong_grid_is_the_one_that_is_told(
    form: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """12x14 positions and one of the class token are 13x13: both files give timm's tokens."""
    model = theirs((192, 224), **settings)
    about = dict(OBLONG[form])
    if form == "model_args":
        about[form] = SIZES | settings | about[form]
    path = with_config(saved(model.state_dict(), tmp_path), num_attention_heads=2, **about)
    opened = open_weights(path)
    assert opened.backbone.spec["image_size"] == [192, 224]
    assert opened.preprocessing.size == (192, 224)
    assert difference(opened, model.forward_features, (192, 224)) < 1e-6
    if not settings:  # the rule for other sizes is timm's too
        assert difference(opened, model.forward_features, (96, 240)) < 1e-6


def test_hugging_faces_image_size_tells_an_oblong_grid(tmp_path: Path) -> None:
    """By their names too."""
    model = theirs((192, 224))
    path = saved(as_hugging_face_vit(dict(model.state_dict())), tmp_path)
    about = {"num_attention_heads": 2, "image_size": [192, 224], "layer_norm_eps": 1e-6}
    opened = open_weights(with_config(path, **about))
    assert difference(opened, model.forward_features, (192, 224)) < 1e-6


def test_a_grid_that_nothing_tells_is_refused_or_said(tmp_path: Path) -> None:
    """169 positions: 12x14 and the class token, or 13x13 as in DeiT III; 55 are no square."""
    for size in ((192, 224), (96, 144)):
        with pytest.raises(
            UserError, match=r"positions, and their number does not tell their grid"
        ):
            open_weights(saved(theirs(size).state_dict(), tmp_path), **HEADS)
    scaled = theirs((192, 224), init_values=1.0)
    path = saved(scaled.state_dict(), tmp_path)
    said = "taken for a grid of 13x13 without one for the class token, not for 12x14 with one"
    assert said in open_weights(path, **HEADS).notes[0]
    assert open_weights(with_config(path, image_size=[192, 224]), **HEADS).backbone.grid == (12, 14)


def test_pretraining_resamples_an_oblong_grid(tmp_path: Path) -> None:
    """Between grids of equal and other counts; the backbone's own grid tells an ambiguous one."""
    source = ViT(image_size=[64, 96], **SIZES)
    randomize(source)
    path = with_config(saved(source.state_dict(), tmp_path), image_size=[64, 96])
    for size in ([96, 64], 80):
        backbone = ViT(image_size=size, **SIZES)
        fit = load_pretrained(backbone, path)
        assert fit.adapted == ["pos_embed"]
        torch.testing.assert_close(backbone.pos_embed, source.positions(backbone.grid))
    same = ViT(image_size=[192, 224], **SIZES)
    randomize(same)
    again = ViT(image_size=[192, 224], **SIZES)
    assert load_pretrained(again, saved(same.state_dict(), tmp_path, "other.pth")).adapted == []
    assert torch.equal(again.pos_embed, same.pos_embed)


# ------------------------------------------------------------------------------------ owners


def below(*prefixes: str) -> Callable[[Weights], Any]:
    """A state dict of a training, the weights of the last prefix the ones to take."""

    def make(weights: Weights) -> Any:
        found: Weights = {"projection_head.0.weight": torch.zeros(2, 2)}
        for i, prefix in enumerate(reversed(prefixes)):
            found |= {f"{prefix}{name}": value + i for name, value in weights.items()}
        return {"state_dict": found, "pytorch-lightning_version": "2.0.0"}

    return make


def of_train(weights: Weights) -> Any:
    """timm's train.py: the average is taken, its args are plain values."""
    args = argparse.Namespace(model="vit_small_patch16_224", mean=None, std=[], interpolation="")
    args.img_size, args.crop_pct, args.model_kwargs = 32, None, SIZES
    both = {"state_dict_ema": weights, "state_dict": {n: v + 1 for n, v in weights.items()}}
    return both | {"arch": "vit_small_patch16_224", "args": args, "version": 2, "epoch": 3}


def headed(weights: Weights) -> Any:
    """A classifier below a prefix."""
    whole = weights | {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}
    return {f"module.{name}": value for name, value in whole.items()}


HALF, USUAL = 0.5, 0.485
# File, owner, its mean of red, and a part of the reason.
FORMS: dict[str, tuple[Callable[[Weights], Any], str, float, str]] = {
    "timm's training": (of_train, "timm", HALF, "timm's training checkpoint names"),
    "a classifier": (headed, "timm", HALF, "it has a classifier; images are normalized by 0.5"),
    "lightly": (
        below("student_backbone.vit.", "teacher_backbone.vit."),
        *("lightly", USUAL, "below teacher_backbone."),
    ),
    "lightly's backbone": (
        lambda weights: {f"vit.{name}": value for name, value in weights.items()},
        *("lightly", USUAL, "below vit."),
    ),
    "solo-learn": (
        below("backbone.", "momentum_backbone."),
        *("solo-learn", USUAL, "below momentum_backbone."),
    ),
    "a Lightning module": (below("backbone."), "solo-learn", USUAL, "say checkpoint_layout=dino"),
}


@pytest.mark.parametrize("form", FORMS)
def test_timms_vits_in_others_files_are_timms_at_every_size(form: str, tmp_path: Path) -> None:
    """timm's numbers at the native, another and an oblong size, its mean, and how it was told."""
    make, owner, mean, why = FORMS[form]
    model = theirs()
    opened = open_weights(saved(make(dict(model.state_dict())), tmp_path), **HEADS)
    assert opened.fit is not None
    assert (opened.fit.layout, opened.mean[0]) == (owner, mean)
    assert why in opened.notes[0]
    for size in ((32, 32), (64, 64), (48, 96)):
        assert difference(opened, model.forward_features, size) < 1e-6


def test_without_evidence_it_is_dinos_and_the_doubt_is_said(tmp_path: Path) -> None:
    """A bare state dict without classifier; the setting, the file beside it and the file's name
    say otherwise.
    """
    model = theirs(embed_dim=192, depth=12, num_heads=3)
    path = saved(model.state_dict(), tmp_path)
    opened = open_weights(path)
    assert opened.fit is not None
    assert opened.fit.layout == "DINO"
    assert "of one say checkpoint_layout=timm" in opened.notes[0]
    assert difference(opened, model.forward_features, (48, 96)) > 1e-3
    named = saved(model.state_dict(), tmp_path, "vit_tiny_patch16_224.augreg_in21k.pth")
    beside = with_config(
        saved(model.state_dict(), tmp_path, "b.pth"), architecture="deit_tiny_patch16_224"
    )
    for told, mean in (
        (open_weights(path, layout="timm"), HALF),
        (open_weights(beside), USUAL),
        (open_weights(named), HALF),
    ):
        assert told.fit is not None
        assert (told.fit.layout, told.mean[0]) == ("timm", mean)
        assert (
            difference(told, model.forward_features, (48, 96)) < 1e-4
        )  # timm resamples in float32
    assert "the file's name" in open_weights(named).notes[0]


def test_a_layout_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """An unknown one beside the file, and one for names of another program."""
    path = with_config(saved(theirs().state_dict(), tmp_path), checkpoint_layout="x")
    with pytest.raises(UserError, match=r"checkpoint_layout=x is none of dino, ibot"):
        open_weights(path, **HEADS)
    other = saved(as_hugging_face_vit(dict(theirs().state_dict())), tmp_path, "hf.pth")
    with pytest.raises(
        UserError, match=r"hf\.pth: checkpoint_layout=timm is for names that several"
    ):
        open_weights(other, layout="timm", **HEADS)


@pytest.mark.parametrize("command", ["evaluate", "compare", "report", "export"])
def test_the_layout_is_a_setting(command: str) -> None:
    """Of each command that opens weights; its values are checked before anything is opened."""
    assert check_values(compose(command, ["checkpoint_layout=timm"]))["checkpoint_layout"] == "timm"
    with pytest.raises(UserError, match="checkpoint_layout=moco: it must be one of dino, ibot"):
        check_values(compose(command, ["checkpoint_layout=moco"]))


def test_evaluation_follows_the_layout(tmp_path: Path) -> None:
    """The file that an evaluation opens is taken for the program's that the setting names."""
    path = saved(theirs(embed_dim=64, num_heads=1).state_dict(), tmp_path)
    checkpoint = find_checkpoint(str(path), tmp_path)
    for layout, offset in ((None, 0.1), ("timm", 0.0)):
        assert open_backbone(checkpoint, layout=layout).backbone.spec["position_offset"] == offset


def sines(side: int, width: int = 24) -> Tensor:
    """MAE's fixed positions "1 1+cells D", zero for the class token."""
    angles = torch.arange(side).double()[:, None] / 10000 ** (
        torch.arange(width // 4) / (width / 4)
    )
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    both = torch.cat([one.repeat(side, 1), one.repeat_interleave(side, 0)], dim=1)
    return torch.cat([torch.zeros(1, width), both])[None]


@pytest.mark.parametrize("decoder", [False, True])
def test_maes_encoder_is_maes(decoder: bool, tmp_path: Path) -> None:
    """Told by its positions or its decoder, which is left aside by name; resampled without
    antialiasing, as MAE's fine-tuning does.
    """
    model = theirs(64, dynamic_img_size=False)
    weights = dict(model.state_dict()) | {"pos_embed": sines(4)}
    more = {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 24)}
    more |= {
        "decoder_pos_embed": torch.ones(1, 17, 8),
        "decoder_blocks.0.norm1.bias": torch.ones(8),
    }
    content = {"model": weights | (more if decoder else {})}
    opened = open_weights(saved(content, tmp_path), **HEADS)
    assert opened.fit is not None
    assert (opened.fit.layout, opened.mean[0]) == ("MAE", USUAL)
    assert opened.backbone.spec["mask_token"] is False
    assert set(opened.fit.unused) == ({f"model.{name}" for name in more} if decoder else set())
    for side in (4, 2):
        other = theirs(16 * side, dynamic_img_size=False)
        cells = sines(4)[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
        cells = F.interpolate(cells, size=(side, side), mode="bicubic", align_corners=False)
        positions = torch.cat([sines(4)[:, :1], cells.flatten(2).transpose(1, 2)], dim=1)
        other.load_state_dict(weights | {"pos_embed": positions})
        assert difference(opened, other.forward_features, (16 * side,) * 2) < 1e-6


def test_ibots_masked_embed_is_the_mask_token(tmp_path: Path) -> None:
    """It replaces masked patches before positions are added."""
    source = ViT(image_size=32, **SIZES, mask_token=True, position_offset=0.1).double().eval()
    randomize(source)
    weights = dict(source.state_dict())
    weights["masked_embed"] = weights.pop("mask_token")
    opened = open_weights(
        saved({"student": {f"module.backbone.{n}": v for n, v in weights.items()}}, tmp_path),
        **HEADS,
    )
    assert opened.fit is not None
    assert opened.fit.layout == "iBOT"
    x, mask = images(32, 32), torch.eye(4).bool()[:2]
    found = opened.backbone.double()(x, mask)
    torch.testing.assert_close(found.patches, source(x, mask).patches, rtol=1e-6, atol=1e-6)


def test_a_folder_of_timm_says_the_norms_and_the_heads(tmp_path: Path) -> None:
    """An architecture with other norms, sizes as model_args; what we do not compute is refused."""
    args = SIZES | {"img_size": [32, 64], "pre_norm": False, "num_heads": 3}
    model: Any = (
        timm.create_model("vit_base_patch16_clip_224", num_classes=0, **args).double().eval()
    )
    randomize(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    about: dict[str, Any] = {"architecture": "vit_base_patch16_clip_224", "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(about))
    opened = open_weights(tmp_path)
    spec = opened.backbone.spec
    assert (spec["norm_eps"], spec["num_heads"], spec["image_size"]) == (1e-5, 3, [32, 64])
    assert difference(opened, model.forward_features, (32, 64)) < 1e-6
    about["model_args"]["act_layer"] = "quick_gelu"
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="vit_base_patch16_clip_224 with the activation QuickGELU"):
        open_weights(tmp_path)
