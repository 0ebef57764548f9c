"""What stands beside weights is heard or refused by name, for opening a file as for a start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers

from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError
from dino_lite.formats.timm_told import completed
from dino_lite.formats.weights import load_pretrained, open_weights
from test_importers import saved, with_config
from test_rope import joined
from test_vit import images, randomize

SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
TINY = {"architecture": "vit_tiny_patch16_224", "model_args": SIZES | {"img_size": 32}}


def network(kind: type[Any] = ViT, **settings: Any) -> Any:
    """With generic weights."""
    backbone = kind(**SIZES | ({"image_size": 32} if kind is ViT else {}) | settings).eval()
    randomize(backbone)
    return backbone


def tiny(**more: Any) -> dict[str, Any]:
    """What says the network of `network`, and `more` of timm's arguments."""
    return TINY | {"model_args": {**SIZES, "img_size": 32, **more}}


@pytest.mark.parametrize("form", ["own", "teacher", "DeiT"])
def test_an_oblong_grid_beside_registers_is_told_or_refused(form: str, tmp_path: Path) -> None:
    """4x6 positions and that of the class token are 5x5, and no owner leaves that one out."""
    source = network(image_size=[32, 48], num_registers=2, mask_token=True)
    content: Any = source.state_dict()
    if form == "teacher":
        content = {"teacher": {f"backbone.{name}": value for name, value in content.items()}}
    if form == "DeiT":
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.DeiTConfig(**sizes, image_size=[32, 48], patch_size=8)
        source = transformers.DeiTModel(config).eval()
        randomize(source)
        content = source.state_dict()
    path = saved(content, tmp_path)
    with pytest.raises(UserError, match="25 positions, and their number does not tell their grid"):
        open_weights(path, num_heads=2)
    told = with_config(path, image_size=[32, 48], num_attention_heads=2)
    backbone, x = open_weights(told).backbone.double(), images(32, 48)
    assert backbone.spec["image_size"] == [32, 48]
    source = source.double()
    with torch.no_grad():
        wanted = source(x).last_hidden_state if form == "DeiT" else joined(source(x))
        assert float((joined(backbone(x)) - wanted).abs().max()) < 1e-6


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown argument": (tiny(act_layer="relu", foo=1), "cannot build .*'foo'"),
    "ReLU": (tiny(act_layer="relu"), "activation ReLU"),
    "SiLU without a gate": (tiny(act_layer="silu"), "activation SiLU"),
    "an unknown model": ({"architecture": "vit_tiny_relu"}, "timm .* does not have"),
    "a hub": ({"architecture": "hf-hub:timm/vit_tiny"}, "timm .* does not have"),
    "a number": ({"architecture": 3}, "architecture=3, which must be text"),
    "a convnet": ({"architecture": "resnet18"}, "resnet18, which is neither a plain ViT"),
    "layers side by side": (
        {"architecture": "vit_small_patch16_18x2_224"},
        "18x2_224, which is neither a plain ViT",
    ),
    "attention to classes": ({"architecture": "cait_xxs24_224"}, "which is neither a plain ViT"),
    "no class token": (
        {"architecture": "vit_base_patch16_siglip_224"},
        "siglip_224, which is neither a plain ViT",
    ),
    "a wider model": (
        {"architecture": "vit_tiny_patch16_224"},
        r"cls_token is \(1, 1, 24\) in the file and \(1, 1, 192\) there",
    ),
    "a deeper model": (tiny(depth=3), r"blocks\.2\..* missing in the file"),
    "no end of blocks": (tiny(depth=10**9), "depth=1000000000"),
    "an endless layer": (tiny(mlp_ratio=1e300), r"model_args=.*1e\+300"),
    "a list of arguments": ({"model_args": [1]}, r"model_args=\[1\], which must be an object"),
    "no preprocessing": ({"pretrained_cfg": 7}, "pretrained_cfg=7, which must be an object"),
    "several layouts": (
        {"checkpoint_layout": ["timm"]},
        r"checkpoint_layout=\['timm'\], which must be text",
    ),
    "heads that are true": ({"num_attention_heads": True}, "num_attention_heads=True, which must"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0, which must"),
    "an epsilon in words": ({"layer_norm_eps": "x"}, "layer_norm_eps=x, which must be a positive"),
    "another activation": ({"hidden_act": "relu"}, "relu"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_describe_the_weights_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    """In a sentence with the file, by opening it and by a start alike."""
    about, words = REFUSED[kind]
    path = with_config(saved(network().state_dict(), tmp_path), **about)
    for use in (lambda: open_weights(path), lambda: load_pretrained(network(), path)):
        with pytest.raises(UserError, match=words) as error:
            use()
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_what_describes_the_weights_is_heard(tmp_path: Path) -> None:
    """Also timm's own class for GELU, and a null for what is not said."""
    path = with_config(
        saved(network().state_dict(), tmp_path), pretrained_cfg=None, **tiny(act_layer="gelu")
    )
    assert open_weights(path).backbone.spec["num_heads"] == 2


def test_a_file_whose_name_is_that_of_another_model_is_refused(tmp_path: Path) -> None:
    """It says how to go on."""
    path = saved(network().state_dict(), tmp_path, "vit_tiny_patch16_224.pth")
    with pytest.raises(UserError, match=r"the file's name names .*cls_token.*: rename it\."):
        open_weights(path)


def test_a_start_is_held_against_what_the_file_says(tmp_path: Path) -> None:
    """Other heads and another activation are refused, other constants are said."""
    source = network(norm_eps=1e-3, position_offset=0.1, position_antialias=False)
    path = saved(source.state_dict(), tmp_path)
    load_pretrained(network(num_heads=3), path)  # nothing tells the heads
    with_config(path, num_attention_heads=2, layer_norm_eps=1e-3)
    with pytest.raises(
        UserError, match=r"trained with 2 heads, .*has 3: set backbone\.num_heads=2"
    ):
        load_pretrained(network(num_heads=3), path)
    assert load_pretrained(network(**source.spec), path).said == ()
    said = load_pretrained(network(), path).said
    assert [clause.split(" is ")[0] for clause in said] == [
        *("norm_eps", "position_offset", "position_antialias"),
    ]
    assert said[0] == "norm_eps is 1e-06 here, 0.001 in the network the weights are of"
    with_config(path, spec=network(act_layer="relu").stored_spec())
    with pytest.raises(UserError, match="trained with ReLU, and the backbone has GELU"):
        load_pretrained(network(), path)


@pytest.mark.parametrize(
    "settings", [{}, {"num_registers": 0, "qkv_bias": True}, {"mlp": "swiglu", "mask_token": True}]
)
def test_our_vits_with_rotary_positions_open_by_their_names(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """As ours; what no weight tells is said, read from beside, and compared at a start."""
    source = network(RoPEViT, rope_base=50.0, **settings)
    path = saved(source.state_dict(), tmp_path)
    opened = open_weights(path, num_heads=2)
    assert opened.fit is not None
    assert opened.fit.layout == "dino_lite"
    assert "their base is 100 unless" in opened.notes[0]
    fit = load_pretrained(network(RoPEViT, **settings | {"rope_base": 60.0}), path)
    assert fit.said == ("rope_base is 60.0 here, 100.0 in the network the weights are of",)
    with_config(path, rope_theta=50.0, num_attention_heads=2)
    x = images(32, 48)
    with torch.no_grad():
        found = joined(open_weights(path).backbone.double()(x))
        assert float((found - joined(source.double()(x))).abs().max()) < 1e-6


def test_positions_that_are_absent_are_none_of_ours_without_a_word(tmp_path: Path) -> None:
    """No register and no bias tells our rotary positions from a file that lost its positions."""
    source = network(RoPEViT, num_registers=0)
    path = saved(source.state_dict(), tmp_path)
    with pytest.raises(UserError, match="lacks pos_embed"):
        open_weights(path, num_heads=2)
    assert open_weights(path, layout="dino_lite", num_heads=2).backbone.num_registers == 0


def test_a_number_of_heads_that_the_width_alone_tells_is_said(tmp_path: Path) -> None:
    """Unless it is the width of published models, or the caller or the file beside it knows."""
    path = saved(network(embed_dim=128).state_dict(), tmp_path)
    assert any("num_heads=2 is a guess" in note for note in open_weights(path).notes)
    assert not any("a guess" in note for note in open_weights(path, num_heads=2).notes)
    with_config(path, num_attention_heads=4)
    assert not any("a guess" in note for note in open_weights(path).notes)
    usual = saved(network(embed_dim=192).state_dict(), tmp_path, "usual.pth")
    assert not any("a guess" in note for note in open_weights(usual).notes)


def test_what_timms_training_leaves_empty_is_what_timm_publishes(tmp_path: Path) -> None:
    """Its arguments are "" or None where none was given."""
    name = "vit_base_patch16_224_miil"
    args = {"model": name, "interpolation": "", "mean": None, "std": [], "crop_pct": 0.5}
    told = completed({"pretrained_cfg": None}, {"arch": name, "args": args}, tmp_path)
    how, published = told["pretrained_cfg"], timm.get_pretrained_cfg(name)
    assert published is not None
    assert how["crop_pct"] == 0.5
    for key in ("interpolation", "mean", "std"):
        assert how[key] == getattr(published, key)
    assert how["interpolation"] == "bilinear"


def test_layers_of_hugging_faces_dinov3_without_bias_open_or_are_named(tmp_path: Path) -> None:
    """All of a block's may lack it, as in timm; some cannot."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    for lacks in (["proj_bias", "mlp_bias"], ["proj_bias"], ["mlp_bias"]):
        config = transformers.DINOv3ViTConfig(
            **sizes, intermediate_size=48, **dict.fromkeys(lacks, False)
        )
        model, folder = transformers.DINOv3ViTModel(config).eval(), tmp_path / "".join(lacks)
        randomize(model)
        model.save_pretrained(folder)
        if len(lacks) == 1:
            layers = "attn.proj" if lacks == ["proj_bias"] else "mlp.fc1, mlp.fc2"
            with pytest.raises(UserError, match=f"its layers {layers} have no bias"):
                open_weights(folder)
            continue
        with torch.no_grad():
            x = images(32, 48)
            wanted = model.double()(x).last_hidden_state
            found = joined(open_weights(folder).backbone.double()(x))
        assert float((found - wanted).abs().max()) < 1e-5  # their sines are in float32


def test_hugging_faces_dinov2_ignores_the_activation_of_its_gate(tmp_path: Path) -> None:
    """So do we."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    more = {"image_size": 32, "use_swiglu_ffn": True, "hidden_act": "silu"}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, **more)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        x = images(32, 32)
        wanted = model.double()(x).last_hidden_state
        found = joined(open_weights(tmp_path).backbone.double()(x))
    assert float((found - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["audio-spectrogram-transformer", "dpt", "pixio"])
def test_other_models_of_hugging_face_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    """Though all names and shapes agree."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32))
    path = saved(model.state_dict(), tmp_path)
    with pytest.raises(UserError, match=f"model_type={kind}, none of vit"):
        open_weights(with_config(path, model_type=kind, num_attention_heads=2))
