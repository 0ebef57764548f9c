"""Weights of others: every layout gives its owner's tokens, and what is none is a sentence."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError
from dino_lite.formats import weights as importer
from dino_lite.formats.weights import Opened, load_pretrained, open_timm, open_weights
from golden.adapters_vit import compare_tokens
from golden.check import Bound, Check, below, compare
from test_golden import cases, check_golden

Weights = dict[str, Tensor]
HEADS = {"num_heads": 4}
LIMITS = {"out64": Bound(1e-9, 1e-10), "out64r": Bound(1e-6, 1e-9)}


def saved(content: Any, folder: Path, name: str = "weights.pth") -> Path:
    """As torch.save writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / name)
    return folder / name


def hold(checks: list[Check]) -> None:
    """Every number within its bound, and some there are."""
    assert checks
    assert [check for check in checks if check_golden.nearness(check) > 1] == []


# ------------------------------------------------------------------------- DINO's, golden A06


def training_checkpoint(weights: Weights) -> dict[str, Any]:
    """What DINO's training leaves: the student is another, tensors of other things lie about."""
    others = {f"module.backbone.{name}": value + 1 for name, value in weights.items()}
    teacher = {f"backbone.{name}": value for name, value in weights.items()}
    return {
        "student": others | {"module.head.last_layer.weight_g": torch.ones(9, 1)},
        "teacher": teacher | {"head.mlp.0.weight": torch.zeros(5, 32)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 7,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.zeros(1, 9)},
        "fp16_scaler": None,
    }


V1_FORMS: dict[str, Callable[[Weights], Any]] = {
    "backbone": lambda weights: weights,
    "prefix": lambda weights: {f"module.backbone.{n}": v for n, v in weights.items()},
    "compiled": lambda weights: {"model": {f"_orig_mod.{n}": v for n, v in weights.items()}},
    "training": training_checkpoint,
}


@pytest.mark.parametrize("form", V1_FORMS)
def test_dinos_files_give_dinos_tokens_at_every_size(
    form: str, golden: Path, tmp_path: Path
) -> None:
    """Golden A06, by DINO's own way of resampling positions; the teacher is taken."""
    (case,) = [case for case in cases(golden) if case["id"].startswith("A06_")]
    tensors = load_file(golden / case["file"])
    path = saved(V1_FORMS[form](below(tensors, "w.")), tmp_path)
    opened = open_weights(path, num_heads=case["hyper"]["vit"]["num_heads"])
    backbone = opened.backbone
    assert opened.fit.layout == "DINO"
    assert opened.image_size == case["hyper"]["vit"]["img_size"]
    backbone.double()
    checks = []
    for height, width in case["hyper"]["sizes_hw"]:
        own = below(tensors, f"{height}x{width}/")
        tokens = backbone(own["in.x_i8"].double() / 32)
        joined = torch.cat([tokens.cls[:, None], tokens.patches], dim=1)
        label = f"{height}x{width}"
        checks.append(compare(label, joined, own["out64.tokens_norm"], LIMITS["out64"]))
    hold(checks)


def test_a_training_checkpoint_is_told_apart(tmp_path: Path) -> None:
    """What was left unused is listed by kind: the student, the head, the center."""
    opened = open_weights(saved(training_checkpoint(small().state_dict()), tmp_path))
    backbone = opened.backbone
    assert opened.fit.num_weights == len(backbone.state_dict())
    assert {name.split(".")[0] for name in opened.fit.unused} == {
        *("student", "teacher", "dino_loss"),
    }
    assert all(".backbone." not in name for name in opened.fit.unused if "teacher" in name)
    assert opened.fit.adapted == []
    text = " | ".join(opened.notes)
    for words in (
        "all 30 weights loaded, from DINO's layout",
        "num_heads=2",
        "left unused: student",
    ):
        assert words in text
    assert "student.module (31), teacher.head, dino_loss" in text


# ----------------------------------------------------------------------- DINOv2's, golden B15


def chunked(weights: Weights, hyper: dict[str, Any]) -> dict[str, Any]:
    """DINOv2's teacher checkpoint: chunks of one block, the number counting through."""
    found: dict[str, Tensor] = {"dino_head.mlp.0.weight": torch.zeros(3, 32)}
    for name, value in weights.items():
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            name = f"blocks.{block}.{block}.{rest}"
        found[f"backbone.{name}"] = value
    return {"teacher": found}


def as_timm(weights: Weights, hyper: dict[str, Any]) -> Weights:
    """timm's: no mask token; with registers the class token has its position in it."""
    found = {}
    for name, value in weights.items():
        found[name.replace("w12", "fc1").replace("w3", "fc2")] = value
    del found["mask_token"]
    if "register_tokens" in found:
        found["reg_token"] = found.pop("register_tokens")
        # in double precision: the sum is to be the reference's to the last digit
        found["cls_token"] = found["cls_token"].double() + found["pos_embed"][:, :1].double()
        found["pos_embed"] = found["pos_embed"][:, 1:]
    return found


def as_hugging_face(weights: Weights, hyper: dict[str, Any]) -> Weights:
    """Hugging Face's Dinov2: three matrices for queries, keys and values."""
    tops = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    parts = {
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.w12": "mlp.weights_in",
        "mlp.w3": "mlp.weights_out",
    }
    found = {}
    for name, value in weights.items():
        if not name.startswith("blocks."):
            found[tops[name]] = value
            continue
        _, block, rest = name.split(".", 2)
        stem = f"encoder.layer.{block}."
        if rest.startswith("attn.qkv."):
            for i, which in enumerate(("query", "key", "value")):
                rows = value[32 * i : 32 * (i + 1)].clone()
                found[f"{stem}attention.attention.{which}.{rest[9:]}"] = rows
            continue
        for ours, theirs in parts.items():
            rest = rest.replace(ours, theirs)
        found[stem + rest] = value
    return {f"dinov2.{name}": value for name, value in found.items()} | {
        "classifier.weight": torch.zeros(10, 64)
    }


V2_FORMS: dict[str, Callable[[Weights, dict[str, Any]], Any]] = {
    "hub": lambda weights, hyper: weights,
    "chunked": chunked,
    "timm": as_timm,
    "hugging face": as_hugging_face,
}


@pytest.mark.parametrize("form", V2_FORMS)
def test_dinov2s_weights_give_dinov2s_tokens_in_every_form(
    form: str, golden: Path, tmp_path: Path
) -> None:
    """Golden B15 at every size and rule, with registers and with gated MLPs, masked and not."""
    (case,) = [case for case in cases(golden) if case["id"].startswith("B15_")]
    tensors = load_file(golden / case["file"])
    checks: list[Check] = []
    for name, variant in case["data"]["variants"].items():
        weights = below(tensors, f"{variant['weights']}/w.")
        path = saved(V2_FORMS[form](weights, case["hyper"]), tmp_path)
        backbone = open_weights(
            path,
            num_heads=case["hyper"]["num_heads"],
            position_offset=variant["interpolate_offset"],
            position_antialias=variant["interpolate_antialias"],
        ).backbone
        assert backbone.num_registers == variant["reg"]
        own, size = below(tensors, f"{name}/"), "x".join(map(str, variant["hw"]))
        x, mask = tensors[f"in.x_i8.{size}"].double() / 32, tensors[f"in.mask.{size}"]
        backbone.double()
        if form == "timm" and variant["reg"]:  # the file's double precision, once more
            backbone.load_state_dict(importer_weights(path))
        checks += compare_tokens(name, backbone(x), own, LIMITS)
        if form != "timm":
            checks += compare_tokens(name, backbone(x, mask), own, LIMITS, "masked.")
    hold(checks)


def importer_weights(path: Path) -> Weights:
    """What the importer makes of a file, as precise as it is."""
    return importer._find(importer.read_weights(path, "checkpoint")[0], {}, "checkpoint").weights


@pytest.mark.parametrize(
    ("form", "registers", "rule"),
    [
        ("hub", 0, (0.1, False)),
        ("chunked", 0, (0.1, False)),
        ("hub", 4, (0.0, True)),
        ("timm", 0, (0.0, True)),
        ("timm", 4, (0.0, True)),
        ("hugging face", 0, (0.0, False)),
        ("hugging face", 4, (0.0, True)),
    ],
)
def test_positions_are_resampled_as_their_owner_does(
    form: str, registers: int, rule: tuple[float, bool], tmp_path: Path
) -> None:
    """Offset and antialiasing of DINOv2, of its models with registers, of timm and of Hugging Face;
    whoever knows better says so.
    """
    source = dinov2(num_registers=registers)
    path = saved(V2_FORMS[form](source, {}), tmp_path)
    opened = open_weights(path, **HEADS)
    backbone = opened.backbone
    assert (backbone.position_offset, backbone.position_antialias) == rule
    assert opened.backbone.spec["position_offset"] == rule[0]
    other = open_weights(path, **HEADS, position_offset=0.3).backbone
    assert other.position_offset == 0.3


def dinov2(**settings: Any) -> Weights:
    """Generic weights of a DINOv2 ViT, by DINOv2's names."""
    sizes = {"image_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 4}
    backbone = ViT(**sizes | settings, mask_token=True, init_values=1.0, mlp="swiglu")  # type: ignore[arg-type]
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter)
    names = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
    found = {}
    for name, value in backbone.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = value
    return found


def test_a_sharded_training_state_is_read_by_its_wrapped_names(tmp_path: Path) -> None:
    """FSDP and activation checkpointing leave their marks in names; the teacher is taken."""
    plain, marked = dinov2(), {}
    for name, value in plain.items():
        inner = name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module.")
        marked[f"student.backbone._fsdp_wrapped_module.{inner}"] = value + 1
        marked[f"teacher.backbone._fsdp_wrapped_module.{inner}"] = value
    backbone = open_weights(saved({"model": marked, "iteration": 3}, tmp_path), **HEADS).backbone
    assert torch.equal(backbone.cls_token, plain["cls_token"])
    assert torch.equal(backbone.blocks[1].mlp.fc1.weight, plain["blocks.1.mlp.w12.weight"])


# --------------------------------------------------------------------------- timm's own models


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_giant_patch14_dinov2", {"embed_dim": 192, "num_heads": 3}),
        ("vit_giant_patch14_reg4_dinov2", {"embed_dim": 192, "num_heads": 3}),
        ("deit3_small_patch16_224", {}),
        ("vit_huge_patch14_224", {}),
    ],
)
def test_timms_files_give_timms_tokens(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """timm's own forward at the native size, from the file alone; the classifier is left aside."""
    args = {"img_size": 28, "patch_size": 14, "depth": 1, **settings}
    model = timm.create_model(name, num_classes=5, **args)
    assert isinstance(model, VisionTransformer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    about = {"architecture": name, "model_args": args}
    about["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "config.json").write_text(json.dumps(about))
    opened = open_weights(tmp_path)
    backbone = opened.backbone
    assert opened.fit.layout == "timm"
    assert set(opened.fit.unused) == {"head.weight", "head.bias"}
    assert (opened.image_size, opened.mean, opened.std) == (28, (0.5,) * 3, (0.25,) * 3)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        wanted, tokens = model.eval().forward_features(images), backbone(images)
    registers = [] if tokens.registers is None else [tokens.registers]
    joined = torch.cat([tokens.cls[:, None], *registers, tokens.patches], dim=1)
    torch.testing.assert_close(joined, wanted, rtol=1e-4, atol=1e-5)


def test_a_timm_model_is_opened_by_name_with_its_own_normalization(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is asked for by name is downloaded, and only that."""
    made = pretend_download(monkeypatch)
    opened = open_timm("test_vit.r160_in1k")
    backbone = opened.backbone
    (model,) = made
    assert (opened.image_size, backbone.patch_size) == (160, 16)
    assert (opened.mean, opened.std) == ((0.5,) * 3, (0.5,) * 3)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        wanted, tokens = model.forward_features(images), backbone(images)
    torch.testing.assert_close(tokens.cls, wanted[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.patches, wanted[:, 1:], rtol=1e-4, atol=1e-5)


def pretend_download(monkeypatch: pytest.MonkeyPatch) -> list[VisionTransformer]:
    """timm.create_model(pretrained=True) without a network; the models it made."""
    made, create = [], timm.create_model

    def pretend(name: str, pretrained: bool = False, **settings: Any) -> Any:
        model = create(name, **settings).eval()
        if pretrained:
            made.append(model)
        return model

    monkeypatch.setattr(timm, "create_model", pretend)
    return made


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_of_dreams", "timm has no such model"),
        ("test_vit.of_dreams", "timm has no such model"),
        ("regnetx_002", "neither a vision transformer nor a ResNet or ConvNeXt"),
        ("resnet50_gn", "no batch normalization"),
        ("vit_base_patch16_clip_224.openai", "not a plain vision transformer"),
    ],
)
def test_a_timm_model_that_is_none_of_ours_is_refused_before_it_is_downloaded(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown names, other networks, other forms."""
    made = pretend_download(monkeypatch)
    with pytest.raises(UserError, match=words) as error:
        open_timm(name)
    assert "\n" not in str(error.value)
    assert made == []


def test_offline_a_timm_model_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No cache and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"timm:test_vit could not be downloaded: are you offline"
    ) as error:
        open_timm("test_vit")
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_tried_once_and_the_cache_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without waiting or a word; afterwards the hub may be asked again."""
    hub = tmp_path / "models--timm--test_vit.r160_in1k"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("a" * 40)
    (hub / "snapshots" / ("a" * 40)).mkdir(parents=True)
    tried = []

    def head(*arguments: object, **keywords: object) -> None:
        tried.append(keywords["timeout"])
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(importer, "get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(UserError, match="could not be downloaded"):
        open_timm("test_vit")
    state = timm.create_model("test_vit").state_dict()
    save_file(state, hub / "snapshots" / ("a" * 40) / "model.safetensors")
    assert open_timm("test_vit").backbone.embed_dim == 64
    assert tried == [5, 5]
    assert caplog.records == []
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


# ------------------------------------------------------------------- Hugging Face's ViT, config


def small(**settings: Any) -> ViT:
    """A plain ViT with generic weights."""
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
    backbone = ViT(**sizes | settings)  # type: ignore[arg-type]
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return backbone.eval()


def as_hugging_face_vit(weights: Weights) -> Weights:
    """Names of transformers' ViTModel."""
    found = {}
    for name, value in weights.items():
        name = name.replace("blocks.", "encoder.layer.")
        for ours, theirs in (
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("cls_token", "embeddings.cls_token"),
            ("pos_embed", "embeddings.position_embeddings"),
        ):
            name = name.replace(ours, theirs)
        name = "layernorm." + name[5:] if name.startswith("norm.") else name
        if "attn.qkv" in name:
            for which, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{which}")] = part.clone()
        else:
            found[name] = value
    return found | {"pooler.dense.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_faces_vits_open_with_what_stands_beside_them(name: str, tmp_path: Path) -> None:
    """Heads, the norms' epsilon and the normalization are those of the folder's files."""
    source = small(norm_eps=1e-3, num_heads=8)
    weights = as_hugging_face_vit(source.state_dict())
    (save_file if name.endswith("s") else torch.save)(weights, tmp_path / name)  # type: ignore[operator]
    about = {"model_type": "vit", "num_attention_heads": 8, "layer_norm_eps": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]})
    )
    opened = open_weights(tmp_path)
    backbone = opened.backbone
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone(images).patches, source(images).patches)
    assert (opened.fit.layout, opened.mean) == ("Hugging Face ViT", (0.1, 0.2, 0.3))
    assert opened.fit.unused == ["pooler.dense.weight"]
    wanted = {f"blocks.{i}.attn.qkv.{which}" for i in (0, 1) for which in ("weight", "bias")}
    assert set(opened.fit.adapted) == wanted


def test_without_a_word_norms_are_those_of_the_layouts_owner(tmp_path: Path) -> None:
    """1e-12 for Hugging Face's ViT, else timm's and the references' 1e-6."""
    plain, weights = small(), small().state_dict()
    for form, eps in ((as_hugging_face_vit(weights), 1e-12), (weights, 1e-6)):
        backbone = open_weights(saved(form, tmp_path)).backbone
        assert backbone.norm.eps == backbone.blocks[0].norm1.eps == eps
    assert plain.norm.eps == 1e-6


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({}, "DINO"),
        ({"qkv_bias": False, "mlp_ratio": 2.7}, "DINO"),
        ({"qk_norm": True, "in_chans": 1}, "DINO"),
        ({"init_values": 0.5}, "timm"),
        ({"mask_token": True}, "DINOv2"),
        ({"num_registers": 1, "mlp": "swiglu", "mlp_ratio": 3.3}, "DINOv2 with registers"),
        ({"mlp": "swiglu", "embed_dim": 192, "num_heads": 3}, "DINO"),
    ],
)
def test_sizes_are_read_out_of_shapes(
    settings: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    """Width, depth, heads, patches, channels, grid, ratio, gates, scales: the tokens are equal."""
    source = small(**settings)
    opened = open_weights(saved(source.state_dict(), tmp_path))
    backbone = opened.backbone
    images = torch.randn(2, source.in_chans, 32, 32)
    found, wanted = backbone(images), source(images)
    torch.testing.assert_close(found.cls, wanted.cls)
    torch.testing.assert_close(found.patches, wanted.patches)
    assert (opened.fit.layout, opened.image_size) == (layout, 32)
    assert len(opened.mean) == len(opened.std) == source.in_chans
    assert not backbone.training
    twin = ViT(**json.loads(json.dumps(opened.backbone.spec)))
    twin.load_state_dict(backbone.state_dict())


def test_opening_draws_no_random_number(tmp_path: Path) -> None:
    """Whoever opens a file beside a run leaves the run as it is."""
    path = saved(small().state_dict(), tmp_path)
    state = torch.random.get_rng_state()
    open_weights(path)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("form", [*V2_FORMS])
def test_pretraining_starts_from_any_form(form: str, tmp_path: Path) -> None:
    """`backbone.pretrained` reads what `checkpoint` reads, but a mask token nobody asked for."""
    source = dinov2()
    backbone = ViT(
        image_size=28,
        patch_size=14,
        embed_dim=32,
        depth=2,
        num_heads=4,
        init_values=1.0,
        mlp="swiglu",
    )
    fit = load_pretrained(backbone, saved(V2_FORMS[form](source, {}), tmp_path))
    assert torch.equal(backbone.blocks[1].attn.qkv.bias, source["blocks.1.attn.qkv.bias"])
    assert ("mask_token" in fit.unused) == (form != "timm")


# ------------------------------------------------------------------------------------ refusals


def spoiled(change: Callable[[Weights], Any], **settings: Any) -> Callable[[Path], Path]:
    """A file with one thing wrong."""

    def write(folder: Path) -> Path:
        weights = dict(small(**settings).state_dict())
        return saved(change(weights) or weights, folder)

    return write


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another network": (
        lambda folder: saved(timm.create_model("test_efficientnet").state_dict(), folder),
        r"holds no backbone: looked for .*DINOv2, DINOv3, timm and Hugging.*the first conv_stem",
    ),
    "nothing": (lambda folder: saved({}, folder), "holds no backbone.* and found none"),
    "garbage": (
        lambda folder: Path(folder, "a.pth").write_bytes(b"x" * 99) and folder / "a.pth",
        "cannot be read as weights",
    ),
    "pickled": (lambda folder: saved({"args": Path("x")}, folder), "cannot be read as weights"),
    "no such file": (lambda folder: folder / "absent.pth", "there is no such file"),
    "a weight missing": (
        spoiled(lambda w: w.pop("blocks.1.mlp.fc1.bias") is None),
        r"1 weight missing, 0 unknown, 0 of another shape, the first blocks\.1\.mlp\.fc1\.bias",
    ),
    "a weight too many": (
        spoiled(lambda w: w | {"blocks.0.mlp.fc3.weight": torch.zeros(1)}),
        r"0 weights missing, 1 unknown.*fc3",
    ),
    "a distilled model": (
        spoiled(lambda w: w | {"dist_token": torch.zeros(1, 1, 128)}),
        "1 unknown.*dist_token",
    ),
    "no positions": (
        spoiled(lambda w: w.pop("pos_embed") is None),
        "lacks pos_embed .*learned positions",
    ),
    "no last norm": (spoiled(lambda w: w.pop("norm.weight") is None), r"lacks norm\.weight"),
    "an oblong grid": (
        spoiled(lambda w: w | {"pos_embed": torch.zeros(1, 13, 128)}),
        r"13 positions, and their number does not tell their grid: write .*image_size.*NAME\.json",
    ),
    "unknown heads": (
        spoiled(lambda w: None, embed_dim=24),
        "number of heads for a width of 24.*NAME.json next to",
    ),
    "another activation": (
        lambda folder: with_config(spoiled(lambda w: None)(folder), hidden_act="gelu_new"),
        "gelu_new",
    ),
    "words about other weights": (
        lambda folder: with_config(spoiled(lambda w: None)(folder), hidden_size=48),
        "hidden_size=48: it belongs to other weights",
    ),
    "our own checkpoint": (
        spoiled(
            lambda w: {"state_dict": {f"method.ema.module.backbone.{n}": v for n, v in w.items()}}
        ),
        "not two folders up",
    ),
}


def with_config(file: Path, **about: Any) -> Path:
    """Write what is said of it beside it."""
    file.with_suffix(".json").write_text(json.dumps(about))
    return file


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_opened_is_a_sentence(kind: str, tmp_path: Path) -> None:
    """One line with the file, what was looked for and what is wrong."""
    write, words = REFUSED[kind]
    path = write(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        open_weights(path)
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")


def test_a_strangers_config_changes_nothing(tmp_path: Path) -> None:
    """config.json in a folder of downloads belongs to another file."""
    path = saved(small().state_dict(), tmp_path)
    before = open_weights(path, num_heads=2).backbone
    about = {
        "num_attention_heads": 4,
        "layer_norm_eps": 0.1,
        "architecture": "x",
        "mean": [0, 0, 0],
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    after = open_weights(path, num_heads=2).backbone
    assert before.spec == after.spec


@pytest.mark.parametrize("told", [{"num_attention_heads": 3}, None])
def test_heads_of_an_odd_width_are_said_beside_or_by_the_caller(
    told: dict[str, int] | None, tmp_path: Path
) -> None:
    """24 wide with 3 heads, as the file beside it says or the call."""
    source = small(embed_dim=24, num_heads=3)
    path = saved(source.state_dict(), tmp_path)
    if told:
        with_config(path, **told)
    opened = open_weights(path, **({} if told else {"num_heads": 3}))
    backbone = opened.backbone
    assert isinstance(opened, Opened)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone(images).cls, source(images).cls)
