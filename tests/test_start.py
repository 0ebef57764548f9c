"""Runs that begin with a file of weights: the network it brings, its heads, what is converted."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.vit import ViT
from dino_lite.config import Config, compose, put
from dino_lite.contracts import UserError
from dino_lite.errors import Interrupted
from dino_lite.formats.head_weights import find_heads
from dino_lite.formats.weights import load_pretrained
from dino_lite.methods.method import Method
from dino_lite.planning.checks import check_values
from dino_lite.planning.plan import plan
from dino_lite.runs.begin import begin_config, build_method
from dino_lite.runs.pretraining import run_pretrain
from test_conf import facts
from tiny import checkpoint, tiny

SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
HEAD = {"num_prototypes": 16, "hidden_dim": 32, "bottleneck_dim": 8}
WORDS = [
    "augment.global_size=32",
    "augment.local_size=16",
    *(f"method.head.{k}={v}" for k, v in HEAD.items()),
]


def network(kind: type[ViT | RoPEViT] = ViT, **settings: Any) -> Any:
    """A tiny backbone with generic weights."""
    sizes = SIZES | ({"image_size": 32} if kind is ViT else {"name": "rope"}) | settings
    backbone = kind(**sizes).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.2)
    return backbone


@functools.cache
def composed(*groups: str) -> Config:
    return compose("pretrain", ["data=shapes", *WORDS, *groups])


def begun(path: Path, *words: str, **of_images: Any) -> tuple[Method, Config]:
    """The method with which a run that names no network begins, and its plan."""
    groups = [word for word in words if "." not in word.partition("=")[0]]
    asked = put(composed(*groups), "backbone.pretrained", str(path))
    for key, _, value in (word.partition("=") for word in words if word not in groups):
        asked = put(asked, key, yaml.safe_load(value))
    config = plan(begin_config(check_values(asked)), facts(**of_images)).config
    return build_method(config), config


def saved(content: Any, folder: Path, heads: int = 2) -> Path:
    """A file as torch.save writes it, which says the number of heads beside it."""
    torch.save(content, folder / "weights.pth")
    (folder / "weights.json").write_text(json.dumps({"num_attention_heads": heads}))
    return folder / "weights.pth"


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def as_dino(folder: Path) -> tuple[Path, Any]:
    source = network()
    return saved({"teacher": prefixed("backbone.", source.state_dict())}, folder), source


def as_export(folder: Path) -> tuple[Path, Any]:
    source = network(num_registers=2, mlp="swiglu", init_values=0.1, qk_norm=True)
    save_file(source.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"spec": source.stored_spec()}))
    return folder, source


def as_rope(folder: Path) -> tuple[Path, Any]:
    source = network(RoPEViT, num_registers=2, init_values=0.1)
    save_file(source.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"spec": source.stored_spec()}))
    return folder, source


@pytest.mark.parametrize("write", [as_dino, as_export, as_rope])
def test_a_file_alone_brings_its_network(
    write: Callable[[Path], tuple[Path, Any]], tmp_path: Path
) -> None:
    """Student and teacher have its weights and its settings, without any being named."""
    path, source = write(tmp_path)
    method, config = begun(path)
    wanted = source.state_dict()
    for network in (method.student.backbone, method.export_backbone()):
        assert type(network) is type(source)
        own = network.state_dict()
        assert own.keys() == wanted.keys()
        assert all(torch.equal(own[name], value) for name, value in wanted.items())
    spec = method.export_backbone().spec
    rules = {
        key: v for key, v in source.spec.items() if write is not as_dino or "position" not in key
    }
    assert {key: spec.get(key) for key in rules} == rules
    assert config["backbone"]["pretrained"] == str(path)


def test_a_dino_file_brings_dinos_rule_of_positions(tmp_path: Path) -> None:
    """Though the default of new networks is another."""
    spec = begun(as_dino(tmp_path)[0])[0].export_backbone().spec
    assert (spec["position_offset"], spec["position_antialias"]) == (0.1, False)


def test_what_the_user_sets_is_converted_and_said(tmp_path: Path) -> None:
    """Patch size, grid, channels and mask token, one clause each; the rest is the file's."""
    source = network(init_values=0.1)
    path = saved({"teacher": source.state_dict()}, tmp_path)
    words = ["backbone.patch_size=4", "data.channels=1", "method=dinov2"]
    method, _ = begun(path, *words, channels=1, mean=(0.5,), std=(0.2,))
    backbone = method.export_backbone()
    assert isinstance(backbone, ViT)
    assert (backbone.patch_size, backbone.in_chans, backbone.grid) == (4, 1, (8, 8))
    assert torch.equal(backbone.cls_token, source.cls_token)
    said = " ".join(method.notes)
    for clause in (
        "patch embedding 8→4 px by pseudo-inverse resize",
        "positions 4x4→8x8, bicubic",
        "patch embedding 3→1 channel, the weights of RGB summed",
        "the mask token starts fresh, since the file has none",
        "head starts fresh: the file has none",
    ):
        assert clause in said


@pytest.mark.parametrize(("old", "new"), [(8, 14), (14, 16), (4, 8)])
def test_enlarged_patches_are_embedded_as_before(old: int, new: int, tmp_path: Path) -> None:
    """Tokens of an image whose patches are resized by the same map: FlexiViT, section 3.4."""
    source = network(patch_size=old, image_size=3 * old)
    path = saved(source.state_dict(), tmp_path)
    other = network(patch_size=new, image_size=3 * new)
    assert "pseudo-inverse" in " ".join(load_pretrained(other, path).said)
    images = torch.randn(2, 3, 3 * old, 3 * old)
    patches = F.unfold(images, old, stride=old)  # n 3*old*old 9
    each = patches.transpose(1, 2).reshape(-1, 3, old, old)
    larger = F.interpolate(each, (new, new), mode="bicubic", antialias=True)
    unfolded = larger.reshape(2, 9, -1).transpose(1, 2)
    enlarged = F.fold(unfolded, (3 * new, 3 * new), new, stride=new)
    with torch.no_grad():
        wanted, found = source(images), other(enlarged)
    torch.testing.assert_close(found.cls, wanted.cls, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.patches, wanted.patches, rtol=1e-4, atol=1e-4)


def test_reduced_patches_are_embedded_with_the_least_error(tmp_path: Path) -> None:
    """A plain loop's matrix of the resize, and its pseudo-inverse in double precision."""
    source = network(patch_size=16, image_size=32)
    other = network(patch_size=14, image_size=28)
    load_pretrained(other, saved(source.state_dict(), tmp_path))
    basis = torch.eye(256).reshape(256, 1, 16, 16)
    resize = F.interpolate(basis, (14, 14), mode="bicubic", antialias=True).reshape(256, 196)
    inverse = torch.linalg.pinv(resize.double())  # 196 256
    wanted = source.patch_embed.proj.weight.double().flatten(2) @ inverse.T
    found = other.patch_embed.proj.weight.double().flatten(2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------ heads


class TheirHead(nn.Module):
    """DINO's projection head, as torch's weight normalization names its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)
        )
        self.last_layer = weight_norm(nn.Linear(8, 16, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last_layer(F.normalize(self.mlp(x), dim=-1))
        return logits


def logits(head: Any, x: Tensor) -> Tensor:
    direction, norm = head.prototypes()
    return head(x) @ (F.normalize(direction, dim=-1) * norm).T


def old_names(head: TheirHead) -> dict[str, Tensor]:
    """As weight normalization named them before torch 2."""
    new = {"original0": "last_layer.weight_g", "original1": "last_layer.weight_v"}
    return {new.get(name.rpartition(".")[2], name): v for name, v in head.state_dict().items()}


@pytest.mark.parametrize("names", ["new", "old"])
def test_dinos_full_checkpoint_brings_its_heads(names: str, tmp_path: Path) -> None:
    """The teacher's, into student and teacher: the same logits as theirs."""
    source, heads = network(), [TheirHead(), TheirHead()]
    weights = [head.state_dict() if names == "new" else old_names(head) for head in heads]
    content = {
        "student": prefixed("module.backbone.", network().state_dict())
        | prefixed("module.head.", weights[0]),
        "teacher": prefixed("backbone.", source.state_dict()) | prefixed("head.", weights[1]),
    }
    method, _ = begun(saved(content, tmp_path))
    x = torch.randn(3, 24)
    with torch.no_grad():
        for head in (method.student.head, method.teachers["ema"].module.head):
            torch.testing.assert_close(logits(head, x), heads[1](x))
    assert method.notes[-1] == "head is the file's"
    assert torch.equal(method.student.backbone.cls_token, source.cls_token)


@pytest.mark.parametrize("kind", ["DINOv2", "iBOT", "iBOT apart"])
def test_heads_of_patches_are_found(kind: str, tmp_path: Path) -> None:
    """DINOv2 has two heads, iBOT second layers in one."""
    first, second = old_names(TheirHead()), old_names(TheirHead())
    if kind == "DINOv2":
        own = prefixed("dino_head.", first) | prefixed("ibot_head.", second)
    else:
        apart = {n: v for n, v in second.items() if kind == "iBOT apart" or "last" in n}
        twice = {n.replace("mlp", "mlp2").replace("layer", "layer2"): v for n, v in apart.items()}
        own = prefixed("head.", first | twice)
        second = second if kind == "iBOT apart" else first | apart
    content = {"teacher": prefixed("backbone.", network().state_dict()) | own}
    path = saved(content, tmp_path)
    patch = [f"method.patch_head.{key}={value}" for key, value in HEAD.items()]
    method, _ = begun(path, "method=dinov2", *patch)
    for head, wanted in ((method.student.head, first), (method.student.patch_head, second)):
        assert all(torch.equal(head.state_dict()[name], value) for name, value in wanted.items())
    assert method.notes[-2:] == ("head is the file's", "patch_head is the file's")


def test_heads_of_another_size_start_fresh_which_is_said(tmp_path: Path) -> None:
    """With the first difference."""
    head = old_names(TheirHead()) | {"last_layer.weight_v": torch.zeros(7, 8)}
    content = {"teacher": prefixed("backbone.", network().state_dict()) | prefixed("head.", head)}
    method, _ = begun(saved(content, tmp_path))
    assert method.notes[-1] == (
        "head starts fresh: last_layer.weight_v is (7, 8) in the file and (16, 8) here"
    )


def test_a_classifier_is_no_projection_head() -> None:
    assert find_heads({"head.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}) == {}


# ------------------------------------------------------------------------------------------- runs


def test_the_gram_teacher_may_be_a_file(tmp_path: Path) -> None:
    """Anchored from the first step on to the weights with which the run begins."""
    path, source = as_rope(tmp_path)
    words = ["method=dinov3", "method.gram.start_step=0"]
    method, _ = begun(path, *words)
    assert torch.equal(method.teachers["gram"].module.cls_token, source.cls_token)
    with pytest.raises(UserError, match=r"backbone\.pretrained=: patches would be anchored"):
        begin_config(compose("pretrain", words))


@pytest.mark.slow
def test_a_run_begun_with_a_file_says_what_it_did_and_resumes_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit as without an interruption; the conversions are said once."""
    source = network(ViT, patch_size=4, image_size=16, embed_dim=32)
    path = saved(source.state_dict(), tmp_path)
    words = (f"backbone.pretrained={path}", "trainer.max_steps=4")
    whole = run_pretrain(tiny(tmp_path, *words, "name=whole"))["run"]
    told = capsys.readouterr().out
    assert told.count("patch embedding 4→8 px by pseudo-inverse resize") == 1
    assert told.count(f"begins with {path}:") == 1
    stop = "callbacks.stop={_target_: tiny.StopAt, step: 2}"
    with pytest.raises(Interrupted):
        run_pretrain(tiny(tmp_path, *words, "name=parts", stop))
    capsys.readouterr()
    path.unlink()
    parts = run_pretrain(tiny(tmp_path, *words, "name=parts"))["run"]
    assert "begins with" not in capsys.readouterr().out
    wanted, found = (checkpoint(Path(run))["state_dict"] for run in (whole, parts))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
