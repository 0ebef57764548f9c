"""DINOv3's weights as its hub, timm and Hugging Face write them: timm's tokens, or a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from dino_lite.backbones.rope import RoPEViT
from dino_lite.contracts import UserError
from dino_lite.formats.weights import load_pretrained, open_timm, open_weights
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from test_importers import pretend_download, saved, with_config
from test_rope import joined
from test_vit import randomize
from tiny import exported

Weights = dict[str, Tensor]
SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
QKVB, GATED = "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"


def theirs(name: str = QKVB, **sizes: Any) -> Any:
    """timm's model with generic weights."""
    model: Any = timm.create_model(name, num_classes=0, **SMALL | sizes).eval()
    randomize(model)
    return model


def as_hub(weights: Weights) -> Weights:
    """DINOv3's own names, with what its training leaves beside a backbone."""
    found: Weights = {"mask_token": torch.randn(1, 48), "local_cls_norm.weight": torch.ones(48)}
    # as its files have them
    found["rope_embed.periods"] = (100.0 ** (torch.arange(4) / 4)).bfloat16()
    for name, value in weights.items():
        if name.endswith("attn.q_bias"):
            stem, ones = name.removesuffix("q_bias"), torch.ones(48)
            other = weights[f"{stem}v_bias"]
            found[f"{stem}qkv.bias"] = torch.cat([value, 5 * ones, other])
            found[f"{stem}qkv.bias_mask"] = torch.cat([ones, 0 * ones, ones])
        elif not name.endswith("attn.v_bias"):
            for ours, hubs in (
                *(
                    ("gamma_1", "ls1.gamma"),
                    ("gamma_2", "ls2.gamma"),
                    ("reg_token", "storage_tokens"),
                ),
                *(("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2")),
            ):
                name = name.replace(ours, hubs)
            gated = "blocks.0.mlp.fc1_g.weight" in weights
            found[name.replace("mlp.fc2", "mlp.w3") if gated else name] = value
    return found


def as_hugging_face(weights: Weights, stem: str = "layer.") -> Weights:
    """Names of transformers' DINOv3ViTModel."""
    tops = {
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
    }
    parts = {
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "attn.proj": "attention.o_proj",
        "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1",
        "mlp.fc1_g": "mlp.gate_proj",
        "mlp.fc1_x": "mlp.up_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    }
    found = {"embeddings.mask_token": torch.randn(1, 1, 48)}
    for name, value in weights.items():
        if not name.startswith("blocks."):
            found[tops.get(name, name)] = value
            continue
        _, block, rest = name.split(".", 2)
        if rest == "attn.qkv.weight":
            for which, rows in zip("qkv", value.chunk(3), strict=True):
                found[f"{stem}{block}.attention.{which}_proj.weight"] = rows.clone()
            continue
        for ours, others in parts.items():
            if rest.startswith(ours):
                rest = rest.replace(ours, others)
                break
        found[f"{stem}{block}.{rest}"] = value
    return found


FORMS: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "hub": (as_hub, "DINOv3"),
    "training": (
        lambda weights: {
            "teacher": {f"backbone.{n}": v for n, v in as_hub(weights).items()}
            | {"dino_head.mlp.0.weight": torch.zeros(3, 48)}
        },
        "DINOv3",
    ),
    "timm": (lambda weights: weights, "timm DINOv3"),
    "hugging face": (as_hugging_face, "Hugging Face DINOv3"),
    "hugging face 5": (
        lambda weights: as_hugging_face(weights, "model.layer."),
        "Hugging Face DINOv3",
    ),
}


@pytest.mark.parametrize("name", [QKVB, GATED, "vit_small_patch16_dinov3"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_timms_tokens(form: str, name: str, tmp_path: Path) -> None:
    """With biases, gated, without; the file alone tells the sizes, but timm's not its heads."""
    model, (make, layout) = theirs(name), FORMS[form]
    path = saved(make(dict(model.state_dict())), tmp_path)
    told = {} if layout == "DINOv3" else {"num_heads": 3}
    opened = open_weights(path, **told)
    backbone = opened.backbone
    assert isinstance(backbone, RoPEViT)
    assert (opened.fit.layout, opened.image_size) == (layout, 128)
    assert (opened.backbone.spec["num_heads"], opened.backbone.spec["num_registers"]) == (3, 4)
    assert opened.backbone.spec["qkv_bias"] == name.endswith("qkvb")
    assert (backbone.mask_token is None) == (form == "timm")
    for size in ((32, 32), (24, 40)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            found, wanted = joined(backbone(x)), model.forward_features(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    left = {
        part
        for name in opened.fit.unused
        for part in ("periods", "bias_mask", "head", "norm")
        if part in name
    }
    wanted_left = {"hub": {"periods", "norm"}, "training": {"periods", "norm", "head"}}.get(
        form, set()
    )
    assert left == wanted_left | ({"bias_mask"} if layout == "DINOv3" and "qkvb" in name else set())


def test_what_was_found_is_said(tmp_path: Path) -> None:
    """The layout, the sizes, what a backbone does without."""
    opened = open_weights(saved(as_hub(dict(theirs().state_dict())), tmp_path))
    text = " | ".join(opened.notes)
    for words in (
        *(
            "all 37 weights loaded, from DINOv3's layout",
            "kind=rope",
            "num_heads=3",
            "qkv_bias=True",
        ),
        *("left unused", "rope_embed", "local_cls_norm", "adapted: blocks.*.attn.qkv (4)"),
    ):
        assert words in text, words


def test_hugging_faces_config_is_heard(tmp_path: Path) -> None:
    """Heads, the norms' epsilon, RoPE's base, the size of images; a gated one has SiLU."""
    weights = as_hugging_face(dict(theirs(GATED).state_dict()))
    save_file(weights, tmp_path / "model.safetensors")
    about = {"model_type": "dinov3_vit", "num_attention_heads": 6, "layer_norm_eps": 1e-3}
    about |= {"rope_theta": 50.0, "image_size": 224, "hidden_act": "silu", "hidden_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(about))
    opened = open_weights(tmp_path)
    backbone = opened.backbone
    assert (opened.backbone.spec["num_heads"], backbone.norm.eps, opened.image_size) == (
        6,
        1e-3,
        224,
    )
    assert (backbone.positions.base, backbone.positions.width) == (50.0, 8)
    (tmp_path / "config.json").write_text(json.dumps(about | {"hidden_act": "gelu"}))
    with pytest.raises(UserError, match="with silu"):
        open_weights(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_pretraining_starts_from_any_form(form: str, tmp_path: Path) -> None:
    """Zero biases that nobody asked for are left, a mask token too; half a model is refused."""
    model = theirs()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_bias", "v_bias")):
                parameter.zero_()
    path = saved(FORMS[form][0](dict(model.state_dict())), tmp_path)
    backbone = RoPEViT(**SMALL)  # type: ignore[arg-type]
    fit = load_pretrained(backbone, path)
    assert torch.equal(backbone.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    assert len([name for name in fit.unused if name.endswith("_bias")]) == 4
    assert any("mask_token" in name for name in fit.unused) == (form != "timm")
    with pytest.raises(UserError, match="does not fit the backbone"):
        load_pretrained(RoPEViT(**SMALL | {"depth": 3}), path)  # type: ignore[arg-type]


def test_gray_images_adapt_the_first_convolution(tmp_path: Path) -> None:
    """As of other layouts."""
    model = theirs()
    path = saved(as_hub(dict(model.state_dict())), tmp_path)
    backbone = RoPEViT(**SMALL, in_chans=1, qkv_bias=True)  # type: ignore[arg-type]
    load_pretrained(backbone, path)
    wanted = model.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(backbone.patch_embed.proj.weight, wanted)


def test_an_export_and_its_file_open_as_what_they_are(tmp_path: Path) -> None:
    """Our own names, with what stands beside them; a run starts from it."""
    source = RoPEViT(**SMALL, qkv_bias=True, mlp="swiglu", mask_token=True)  # type: ignore[arg-type]
    randomize(source)
    x = torch.randn(2, 3, 32, 32)
    exported(source, tmp_path / "out")
    file = find_checkpoint(str(tmp_path / "out" / "model.safetensors"), tmp_path)
    for path in (find_checkpoint(str(tmp_path / "out"), tmp_path), file):
        about = open_backbone(path)
        backbone = about.backbone
        assert isinstance(backbone, RoPEViT)
        assert about.image_size == 32
        torch.testing.assert_close(backbone(x).patches, source.eval()(x).patches)
    twin = RoPEViT(**SMALL, qkv_bias=True, mlp="swiglu", mask_token=True)  # type: ignore[arg-type]
    load_pretrained(twin, tmp_path / "out")
    assert torch.equal(twin.register_tokens, source.register_tokens)


@pytest.mark.parametrize("name", [QKVB, "vit_small_patch16_dinov3.lvd1689m"])
def test_a_timm_dinov3_is_opened_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With timm's size and normalization, and the same tokens."""
    made = pretend_download(monkeypatch)
    opened = open_timm(name)
    backbone = opened.backbone
    (model,) = made
    assert (opened.image_size, opened.mean[0], backbone.patch_size) == (256, 0.485, 16)
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        found, wanted = joined(backbone(x)), model.forward_features(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------- what a number or a mask changes


@pytest.mark.parametrize("form", ["hub", "hugging face"])
def test_an_unmasked_bias_of_keys_is_used(form: str, tmp_path: Path) -> None:
    """As timm's attention with three biases does."""
    model = theirs(attn_type="rope")
    weights = dict(model.state_dict())
    apart, hub_biases = {}, {}
    for name, value in weights.items():
        if name.endswith("qkv.bias"):
            query, key, bias = value.chunk(3)
            stem = name.removesuffix("qkv.bias")
            apart |= {f"{stem}q_bias": query, f"{stem}v_bias": bias}
            index = name.split(".")[1]
            hub_biases[f"layer.{index}.attention.k_proj.bias"] = key
        else:
            apart[name] = value
    if form == "hub":
        found = as_hub(apart)
        for name in [n for n in found if n.endswith("qkv.bias_mask")]:
            found[name] = torch.ones(144)
            found[name.removesuffix("_mask")] = weights[name.removesuffix("_mask")]
    else:
        found = as_hugging_face(apart) | hub_biases
    opened = open_weights(saved(found, tmp_path), num_heads=3)
    assert opened.backbone.spec["key_bias"] is True
    x = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        wanted = model.forward_features(x)
    torch.testing.assert_close(joined(opened.backbone(x)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", [50.0, 10_000.0, 123.456])
@pytest.mark.parametrize("rounded", [False, True])
def test_another_base_is_read_from_the_periods(base: float, rounded: bool, tmp_path: Path) -> None:
    """Of a number that bfloat16 rounds only two digits are known."""
    weights = as_hub(dict(theirs(rope_temperature=base).state_dict()))
    periods = base ** (torch.arange(4) / 4)
    weights["rope_embed.periods"] = periods.bfloat16() if rounded else periods
    found = open_weights(saved(weights, tmp_path)).backbone.spec["rope_base"]
    assert found == pytest.approx(base, rel=0.03 if rounded and base == 123.456 else 1e-5)


@pytest.mark.parametrize("normalizer", ["max", "min"])
def test_coordinates_are_normalized_as_the_file_beside_says(
    normalizer: str, tmp_path: Path
) -> None:
    """timm's numbers on oblong images; others than the default differ there."""
    model = theirs()
    path = saved(as_hub(dict(model.state_dict())), tmp_path)
    usual = open_weights(path).backbone
    with_config(path, student={"pos_embed_rope_normalize_coords": normalizer})
    backbone = open_weights(path).backbone
    assert backbone.spec["rope_normalize_coords"] == normalizer
    model.rope.normalize_coords = normalizer
    for size in ((24, 40), (56, 16), (32, 32)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            wanted = model.forward_features(x)
        torch.testing.assert_close(joined(backbone(x)), wanted, rtol=1e-4, atol=1e-4)
        same = torch.allclose(joined(usual(x)), wanted, rtol=1e-4, atol=1e-4)
        assert same == (size[0] == size[1])


# ------------------------------------------------------------------------------------ refusals


def hub(**changes: Tensor) -> Callable[[Path], Path]:
    """A file of the hub's with other weights in it; dots in names are double underscores."""

    def write(folder: Path) -> Path:
        weights = as_hub(dict(theirs().state_dict()))
        given = {name.replace("__", "."): value for name, value in changes.items()}
        return saved(weights | given, folder)

    return write


def without(*names: str, **about: Any) -> Callable[[Path], Path]:
    """A file of timm's that lacks weights, with what is said beside it."""

    def write(folder: Path) -> Path:
        weights = dict(theirs().state_dict())
        path = saved({n: v for n, v in weights.items() if n not in names}, folder)
        return with_config(path, **{"num_attention_heads": 3} | about)

    return write


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "periods of no base": (
        hub(rope_embed__periods=torch.tensor([1.0, 3.0, 4.0, 90.0])),
        r"1 unknown.*rope_embed\.periods",
    ),
    "a second norm": (hub(cls_norm__weight=torch.ones(48)), r"1 unknown.*cls_norm\.weight"),
    "no last norm": (without("norm.weight"), r"lacks norm\.weight.*DINOv3 ViTs, can be opened"),
    "half an MLP": (without("blocks.1.mlp.fc1.bias"), r"1 weight missing.*blocks\.1\.mlp\.fc1"),
    "unknown heads": (
        lambda folder: with_config(without()(folder)),
        "number of heads for a width of 48.*NAME.json next to",
    ),
    "another width": (without(hidden_size=64), "hidden_size=64: it belongs to other weights"),
    "another activation": (without(hidden_act="relu"), "with gelu.*relu"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_opened_is_a_sentence(kind: str, tmp_path: Path) -> None:
    """One line with the file and what is wrong."""
    write, words = REFUSED[kind]
    path = write(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        open_weights(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
