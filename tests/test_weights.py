"""Starting from a file: every format, classifiers, other grids, and what does not fit or read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError
from dino_lite.formats.tensors import read_content
from dino_lite.formats.weights import load_pretrained

Weights = dict[str, Tensor]
SPEC: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
}


def source(**settings: Any) -> ViT:
    """A backbone with generic weights."""
    backbone = ViT(**SPEC | settings).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_()
    return backbone


def started(path: Path, **spec: Any) -> ViT:
    """A new backbone, filled with the weights in `path`."""
    backbone = ViT(**spec)
    load_pretrained(backbone, path)
    return backbone


def as_folder(weights: Weights, folder: Path) -> Path:
    """An exported backbone's folder."""
    save_file(weights, folder / "model.safetensors")
    return folder


def as_safetensors(weights: Weights, folder: Path) -> Path:
    save_file(weights, folder / "vit.safetensors")
    return folder / "vit.safetensors"


def as_torch(weights: Any, folder: Path) -> Path:
    torch.save(weights, folder / "vit.pth")
    return folder / "vit.pth"


FORMATS: dict[str, Callable[[Weights, Path], Path]] = {
    "folder": as_folder,
    "safetensors": as_safetensors,
    "pth": as_torch,
    "nested state_dict": lambda w, folder: as_torch({"state_dict": w, "epoch": 3}, folder),
    "nested model": lambda w, folder: as_torch({"model": w, "args": {"lr": 0.1}}, folder),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_fills_the_backbone(form: str, tmp_path: Path) -> None:
    """It holds the file's weights to the last bit."""
    wanted = source().state_dict()
    backbone = started(FORMATS[form](wanted, tmp_path), **SPEC)
    assert all(torch.equal(value, wanted[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    "names", [["head.weight", "head.bias"], ["fc_norm.weight"], ["head_dist.weight"]]
)
def test_a_classifier_is_left_aside_and_told(names: list[str], tmp_path: Path) -> None:
    """What belongs to another task is no misfit."""
    weights = source().state_dict() | {name: torch.zeros(3) for name in names}
    fit = load_pretrained(ViT(**SPEC), as_safetensors(weights, tmp_path))
    assert set(fit.unused) == set(names)
    assert fit.adapted == []


def test_half_precision_files_fill_a_float32_backbone(tmp_path: Path) -> None:
    """Values as rounded in the file, in the backbone's own precision."""
    weights = {name: value.half() for name, value in source().state_dict().items()}
    backbone = started(as_safetensors(weights, tmp_path), **SPEC)
    assert backbone.norm.weight.dtype == torch.float32
    assert torch.equal(backbone.norm.weight, weights["norm.weight"].float())


@pytest.mark.parametrize("image_size", [16, 64, 8])
def test_positions_of_another_grid_are_resampled(image_size: int, tmp_path: Path) -> None:
    """The new backbone's positions are those that the old one has for images of the new size."""
    old = source()
    path = as_safetensors(old.state_dict(), tmp_path)
    new = started(path, **SPEC | {"image_size": image_size}).eval()
    cells = image_size // 8
    torch.testing.assert_close(new.pos_embed, old.positions((cells, cells)))
    images = torch.randn(2, 3, image_size, image_size)
    torch.testing.assert_close(new(images).cls, old(images).cls)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~/vit.safetensors is in the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    as_safetensors(source().state_dict(), tmp_path)
    assert "cls_token" in read_content("~/vit.safetensors")[0]


def drop(name: str) -> Callable[[Weights], None]:
    """Lose a weight."""
    return lambda weights: weights.__delitem__(name)


def put(name: str, *shape: int) -> Callable[[Weights], None]:
    """Add or replace a weight."""
    return lambda weights: weights.update({name: torch.zeros(*shape)})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            drop("norm.bias"),
            r"1 weight missing, 0 unknown, 0 of another shape, the first norm\.bias",
        ),
        (put("blocks.2.ls1.gamma", 8), r"0 weights missing, 1 unknown.*the first blocks\.2\.ls1"),
        (put("norm.weight", 9), r"the first norm\.weight \(\(9,\) in the file, \(8,\) here\)"),
        (put("pos_embed", 1, 17, 9), r"the first pos_embed"),
        (put("pos_embed", 1, 13, 8), r"has 13 positions.* not that of 32x32 pixels"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_none_is_loaded(
    spoil: Callable[[Weights], None], words: str, tmp_path: Path
) -> None:
    """The sentence counts what is wrong and shows the first; the backbone stays as it was."""
    weights = source().state_dict()
    spoil(weights)
    path, backbone = as_safetensors(weights, tmp_path), ViT(**SPEC)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(UserError, match=words) as error:
        load_pretrained(backbone, path)
    assert_one_sentence(error, path)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


class Payload:
    """A pickle that makes a file when somebody loads it."""

    def __init__(self, folder: Path) -> None:
        self.trace = folder / "trace"

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.trace,)


def garbage(folder: Path, name: str = "vit.pth") -> Path:
    (folder / name).write_bytes(b"not weights at all")
    return folder / name


def truncated(folder: Path) -> Path:
    path = as_safetensors(source().state_dict(), folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


UNREADABLE: dict[str, Callable[[Path], Path]] = {
    "no such file": lambda folder: folder / "absent.pth",
    "folder without weights": lambda folder: folder,
    "garbage": garbage,
    "garbage in safetensors": lambda folder: garbage(folder, "vit.safetensors"),
    "empty": lambda folder: (folder / "e.pth").touch() or folder / "e.pth",  # type: ignore[func-returns-value]
    "truncated": truncated,
    "pickled object": lambda folder: as_torch({"model": Payload(folder)}, folder),
    "numbers": lambda folder: as_torch({"a": 1, "b": torch.zeros(1)}, folder),
    "a list": lambda folder: as_torch([torch.zeros(1)], folder),
    "a tensor": lambda folder: as_torch(torch.zeros(1), folder),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_state_dict_is_refused(kind: str, tmp_path: Path) -> None:
    """Never a traceback, never an object unpickled: one sentence with the path."""
    path = UNREADABLE[kind](tmp_path)
    with pytest.raises(UserError, match=r"^backbone\.pretrained=") as error:
        started(path, **SPEC)
    assert_one_sentence(error, path)
    assert not (tmp_path / "trace").exists()


def assert_one_sentence(error: pytest.ExceptionInfo[UserError], path: Path) -> None:
    """One line that names the file and ends as a sentence does."""
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")


def test_pretrained_positions_are_resampled_by_the_backbones_own_rule(tmp_path: Path) -> None:
    """Loaded at another grid they are what the old backbone would have used there."""
    rule = {"position_offset": 0.1, "position_antialias": False}
    old = source(**rule)
    save_file(old.state_dict(), tmp_path / "a.safetensors")
    new = started(tmp_path / "a.safetensors", **SPEC | rule | {"image_size": 64})
    torch.testing.assert_close(new.pos_embed, old.positions((8, 8)))


# ------------------------------------------------------------------------------- other channels

STEM = "patch_embed.proj.weight"


def adapted(in_chans: int, folder: Path, **settings: Any) -> tuple[ViT, ViT]:
    """A backbone of 3 channels, and one of others that has its weights."""
    old = source(**settings)
    path = as_safetensors(old.state_dict(), folder)
    new = ViT(**SPEC | {"in_chans": in_chans}).eval()
    assert load_pretrained(new, path).adapted == [STEM]
    return old, new


def test_gray_images_are_to_an_adapted_backbone_what_they_were_as_rgb(tmp_path: Path) -> None:
    """Every token is the same, for the sum of the weights is what equal channels met."""
    old, new = adapted(1, tmp_path)
    images = torch.randn(3, 1, 32, 32)
    torch.testing.assert_close(new(images).patches, old(images.expand(3, 3, 32, 32)).patches)


@pytest.mark.parametrize("in_chans", [2, 4, 5, 6, 12])
def test_more_channels_take_rgbs_weights_in_turn(in_chans: int, tmp_path: Path) -> None:
    """A plain loop's weights; the mean over all of them, and so the mean response, stays."""
    old, new = adapted(in_chans, tmp_path)
    rgb, found = old.state_dict()[STEM], new.state_dict()[STEM]
    for channel in range(in_chans):
        wanted = rgb[:, channel % 3] * 3 / in_chans
        torch.testing.assert_close(found[:, channel], wanted)
    others = {name: value for name, value in new.state_dict().items() if name != STEM}
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in others.items())


def test_rgb_twice_over_is_rgb_to_an_adapted_backbone(tmp_path: Path) -> None:
    """With a multiple of three channels the response is the same to the last token."""
    old, new = adapted(6, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(new(torch.cat([images, images], 1)).cls, old(images).cls)


def test_constant_images_of_any_channels_meet_the_same_mean_weight(tmp_path: Path) -> None:
    """Where red, green and blue weigh alike, an equal image gives an equal response."""
    old = source()
    with torch.no_grad():
        old.patch_embed.proj.weight[:] = old.patch_embed.proj.weight[:, :1]
    path = as_safetensors(old.state_dict(), tmp_path)
    for in_chans in (1, 2, 4, 5, 7):
        new = ViT(**SPEC | {"in_chans": in_chans}).eval()
        load_pretrained(new, path)
        plane = torch.randn(1, 1, 32, 32)
        tokens = new(plane.expand(1, in_chans, 32, 32)).cls
        torch.testing.assert_close(tokens, old(plane.expand(1, 3, 32, 32)).cls)


@pytest.mark.parametrize(("stored", "wanted"), [(1, 3), (4, 3), (5, 1), (6, 4)])
def test_only_weights_of_rgb_are_adapted(stored: int, wanted: int, tmp_path: Path) -> None:
    """Of others nobody knows what their channels were."""
    path = as_safetensors(source(in_chans=stored).state_dict(), tmp_path)
    with pytest.raises(UserError, match=rf"takes images of {stored} channels?,") as error:
        started(path, **SPEC | {"in_chans": wanted})
    assert_one_sentence(error, path)


def test_weights_of_the_same_channels_stay_as_they_are(tmp_path: Path) -> None:
    """Five are loaded into five."""
    old = source(in_chans=5)
    new = ViT(**SPEC | {"in_chans": 5})
    assert load_pretrained(new, as_safetensors(old.state_dict(), tmp_path)).adapted == []
    assert torch.equal(new.state_dict()[STEM], old.state_dict()[STEM])
