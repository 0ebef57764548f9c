"""`dino-lite embed` and `dino_lite.embed`: the same features as evaluations use, in files that
other libraries read, in parts that survive an interruption.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

import dino_lite
from dino_lite.backbones.compact import Compact
from dino_lite.backbones.vit import ViT
from dino_lite.commands.embed import run_embed
from dino_lite.config import Config, compose, put
from dino_lite.contracts import Interrupted, Splits, Tokens, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.given import as_source
from dino_lite.data.transform import pixels_of
from dino_lite.eval import feature_files
from dino_lite.eval.embedder import Embedder
from dino_lite.eval.feature_parts import usual_part_images
from dino_lite.eval.features import frozen
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.feature_folder import FeatureFolder
from dino_lite.runs.run import locked
from ranks import on_ranks
from tiny import exported, photos, train

NAMES = [f"{split}/{label}/{i}.png" for split in ("train", "val") for label in "ab" for i in "123"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with its checkpoint."""
    return train(tmp_path_factory.mktemp("runs"), "trainer.max_steps=2")


@pytest.fixture(scope="module")
def weights(run: Path) -> Path:
    """The export of the run, which opens in a fraction of the time."""
    out = run.parent / "exported"
    opened = open_backbone(find_checkpoint(str(run), run.parent))
    return exported(opened.backbone, out, size=opened.image_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of two classes and two splits, the second of train unreadable."""
    folder = photos(tmp_path_factory.mktemp("photos"), NAMES)
    (folder / NAMES[1]).write_bytes(b"no image")
    return folder


@functools.cache
def composed() -> Config:
    return compose("embed", [])


def written(run: Path, out: Path, *overrides: str) -> Path:
    """The folder that the command has written, "key=value" on top."""
    config = composed()
    words = [f"checkpoint={run}", f"out={out}", "accelerator=cpu", "num_workers=0"]
    for key, _, value in (word.partition("=") for word in [*words, *overrides]):
        config = put(config, key, yaml.safe_load(value))
    return run_embed(config)


def content(folder: Path) -> dict[str, str]:
    """Every file and its hash."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {f"{p.relative_to(folder)}": sha256(p.read_bytes()).hexdigest() for p in files}


def tokens_of(run: Path, paths: list[Path], blocks: list[int]) -> list[Tokens]:
    """The tokens as evaluations compute them, image by image."""
    opened = open_backbone(find_checkpoint(str(run), run.parent))
    source = as_source(paths)
    data = CleanData(Splits(source, None, "x"), opened.preprocessing, 64)
    ((images, _),) = data.batches(source, torch.device("cpu"))
    with frozen(opened.backbone):
        found: list[Tokens] = opened.backbone.intermediate(images, blocks)
    return found


def test_features_names_and_labels_are_those_of_the_images(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    """Of every readable image, in order: class token, mean and all patches of two blocks, beside
    the backbone's own; the unreadable one is listed, and counted.
    """
    words = [f"data.root={folder}", "features=[cls,mean_patch,patches]", "blocks=[0,-1]"]
    out = written(run, tmp_path / "out", *words, "batch_size=2")
    readable = [folder / name for name in NAMES if name != NAMES[1]]
    earlier, last = tokens_of(run, readable, [0, 1])
    meta = json.loads((out / "meta.json").read_text())
    for split, rows in (("train", slice(0, 5)), ("test", slice(5, 11))):
        part = {p.stem: np.load(p) for p in (out / f"{split}-00000-of-00001").iterdir()}
        assert part["name"].tolist() == [str(path) for path in readable[rows]]
        assert part["index"].tolist() == ([0, 2, 3, 4, 5] if split == "train" else [*range(6)])
        classes = meta["splits"][split]["classes"]
        assert [classes[i] for i in part["label"]] == [path.parent.name for path in readable[rows]]
        for tokens, suffix in ((last, ""), (earlier, "_block_0")):
            own = {
                "cls": tokens.cls,
                "patches": tokens.patches,
                "mean_patch": tokens.patches.mean(1),
            }
            for name, values in own.items():
                found = part[f"{name}{suffix}"]
                np.testing.assert_allclose(found, values[rows], rtol=1e-5, atol=1e-5)
                assert list(found.shape[1:]) == meta["features"][f"{name}{suffix}"]["shape"]
    assert (meta["splits"]["train"]["unreadable"], meta["splits"]["test"]["unreadable"]) == (1, 0)
    assert str(folder / NAMES[1]) in (out / "bad_files.csv").read_text()


def read_npy(part: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    return (
        np.load(part / "name.npy").tolist(),
        np.load(part / "label.npy"),
        np.load(part / "patches.npy"),
    )


def read_parquet(part: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    table = pq.read_table(part)
    label = table["label"].to_numpy()
    assert table["split"].to_pylist() == ["train"] * len(table)
    assert table["class_name"].to_pylist() == ["ab"[i] for i in label]
    return table["name"].to_pylist(), label, np.array(table["patches"].to_pylist())


def read_safetensors(part: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    with safe_open(part, "np") as file:
        return (
            json.loads(file.metadata()["name"]),
            file.get_tensor("label"),
            file.get_tensor("patches"),
        )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_format_holds_the_same(
    weights: Path, folder: Path, tmp_path: Path, dtype: str
) -> None:
    """Read by numpy, pyarrow and safetensors."""
    words = [f"data.root={folder}", "features=patches", "splits=train", f"dtype={dtype}"]
    found = []
    for form, read in {
        "npy": read_npy,
        "parquet": read_parquet,
        "safetensors": read_safetensors,
    }.items():
        out = written(weights, tmp_path / form, *words, f"file_format={form}")
        (part,) = out.glob("train-*")
        found.append(read(part))
    for names, labels, patches in found:
        assert names == [str(folder / name) for i, name in enumerate(NAMES[:6]) if i != 1]
        assert labels.tolist() == [0, 0, 1, 1, 1]
        np.testing.assert_array_equal(patches, found[0][2])
    assert found[0][2].dtype == found[2][2].dtype == np.dtype(dtype)


def test_vectors_of_unit_length_are_the_same_directions(weights: Path, folder: Path) -> None:
    """Lengths are 1, cosines with the others 1."""
    path = folder / NAMES[0]
    plain = dino_lite.embed(path, weights, "patches")[0]
    unit = dino_lite.embed(path, weights, "patches", unit_length=True)[0]
    np.testing.assert_allclose(
        unit * np.linalg.norm(plain, axis=1, keepdims=True), plain, rtol=1e-5
    )


@pytest.mark.parametrize("form", ["npy", "parquet", "safetensors"])
def test_an_interrupted_command_goes_on_and_ends_with_the_same_bytes(
    weights: Path,
    folder: Path,
    tmp_path: Path,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped after a part and in the middle of writing the next; what was written is kept."""
    words = [f"data.root={folder}", f"file_format={form}", "part_images=4", "batch_size=3"]
    whole = content(written(weights, tmp_path / "whole", *words))
    real, parts = FeatureFolder.write, []

    def stopping(self: FeatureFolder, *given: Any) -> None:
        parts.append(given)
        if len(parts) > 1:
            (self.folder / f".{self.path(given[0]).name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureFolder, "write", stopping)
        with pytest.raises(Interrupted, match=r"1 of 4 parts are in .* goes on after them"):
            written(weights, tmp_path / "out", *words)
    first = next((tmp_path / "out").glob("train-00000*"))
    before = first.stat().st_mtime_ns
    assert content(written(weights, tmp_path / "out", *words)) == whole
    assert first.stat().st_mtime_ns == before
    assert "1 of 4 parts are there already" in capsys.readouterr().out
    written(weights, tmp_path / "out", *words)
    assert "finished already: 11 images, 4 parts" in capsys.readouterr().out


def on_rank(rank: int, run: str, out: str, words: list[str]) -> str:
    """What a rank that has written is told when it asks for other features."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        written(Path(run), Path(out), *words)
        try:
            written(Path(run), Path(out), *words, "dtype=float16")
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.slow
def test_two_ranks_write_what_one_does(run: Path, folder: Path, tmp_path: Path) -> None:
    """Every byte, the list of unreadable images too; all are told what is refused."""
    words = [f"data.root={folder}", "part_images=2", "batch_size=2", "features=[cls,patches]"]
    alone = content(written(run, tmp_path / "alone", *words))
    told = on_ranks(2, on_rank, str(run), str(tmp_path / "both"), words)
    assert content(tmp_path / "both") == alone
    assert all("dtype=float32, not float16" in each for each in told)


def add_image(folder: Path, run: Path) -> None:
    shutil.copy(folder / NAMES[0], folder / "train/a/9.png")


def change_image(folder: Path, run: Path) -> None:
    Image.new("RGB", (9, 9)).save(folder / NAMES[0])


def change_weights(folder: Path, run: Path) -> None:
    file = run / "checkpoints/last.ckpt"
    state = torch.load(file, weights_only=True)
    for name, value in state["state_dict"].items():
        if name.endswith("cls_token"):
            value.add_(1)
    torch.save(state, file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add_image, "of other data"),
        (change_image, "or its files or labels have changed"),
        (change_weights, r"of other weights \(checkpoint="),
    ],
)
def test_changed_images_and_weights_are_refused(
    run: Path, folder: Path, tmp_path: Path, change: Callable[[Path, Path], None], said: str
) -> None:
    """A file more, other pixels under the same name, a run that was trained on."""
    copies = shutil.copytree(folder, tmp_path / "photos"), shutil.copytree(run, tmp_path / "run")
    out = written(copies[1], tmp_path / "out", f"data.root={copies[0]}")
    before = content(out)
    change(*copies)
    with pytest.raises(UserError, match=rf"{said}.*: give another out="):
        written(copies[1], out, f"data.root={copies[0]}")
    assert content(out) == before


@pytest.fixture(scope="module")
def finished(weights: Path, folder: Path) -> Path:
    """Class tokens of the photographs."""
    return written(weights, weights.parent / "finished", f"data.root={folder}")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("unit_length=true", "with unit_length=false, not true"),
        ("features=patches", "features cls, not patches"),
        ("part_images=5", "with part_images=4096, not 5"),
        ("image_size=24", r"of preprocessing size=\[16, 16\], not \[24, 24\]"),
        ("splits=test", "of other data"),
    ],
)
def test_other_settings_are_refused(
    weights: Path, folder: Path, finished: Path, word: str, said: str
) -> None:
    """Features of two kinds never stand in one folder; the sentence says what differs."""
    before = content(finished)
    with pytest.raises(UserError, match=rf"{said}.*: give another out=") as error:
        written(weights, finished, f"data.root={folder}", word)
    with locked(finished, "is locked although it was refused"):
        del error  # whose traceback would keep a lock that nothing else releases
    assert content(finished) == before


def test_batch_size_and_the_place_of_the_checkpoint_may_change(
    weights: Path, folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither decides what is written."""
    moved = shutil.copytree(weights, tmp_path / "moved")
    written(moved, finished, f"data.root={folder}", "batch_size=5")
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["features=[]"], r"features=\[\]: name at least one"),
        (["blocks=2"], "blocks=2: the network has 2 blocks, so a number from -2 to 1"),
        (["features=class"], "features=class: it must be one of cls, mean_patch, patches"),
        (["splits=test"], "splits=test: photos has one split only"),
        (["image_size=20"], "image_size=20: must be a multiple of the backbone's patch size, 8"),
        (["part_images=0"], "part_images=0: it must be a whole number of at least 1"),
        (["precision=16"], "precision=16: it must be 32 or bf16"),
    ],
)
def test_impossible_settings_are_a_sentence(
    weights: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    """And leave no folder."""
    root = photos(tmp_path / "photos", ["1.png"])
    with pytest.raises(UserError, match=said):
        written(weights, tmp_path / "out", f"data.root={root}", *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(weights: Path, folder: Path) -> None:
    """As the images' own."""
    with pytest.raises(UserError, match="holds other files"):
        written(weights, folder, f"data.root={folder}")


@pytest.mark.parametrize(
    ("out", "root"),
    [
        ("photos/out", "photos"),
        ("photos/a/deep/out", "photos"),
        ("photos/out", "photos/*"),
        ("photos/a/out", "[photos/b,photos/a]"),
        ("link/out", "photos"),
        ("photos/out", "link"),
        ("photos/leads_out", "photos"),
    ],
)
def test_a_folder_in_that_of_the_images_is_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, root: str
) -> None:
    """Which the next command would read as a class; also by links."""
    photos(tmp_path / "photos", ["a/1.png", "b/2.png"])
    (tmp_path / "link").symlink_to("photos")
    (tmp_path / "photos" / "leads_out").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.rglob("*")}
    with pytest.raises(UserError, match=rf"out={out} lies in data\.root=.*: name a folder outside"):
        written(weights, Path(out), f"data.root={root}")
    assert {*tmp_path.rglob("*")} == before
    written(weights, tmp_path / "photos2", f"data.root={root}")  # begins with the same letters


def test_a_folder_that_cannot_be_written_is_a_sentence(
    weights: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, below a file, on a medium for reading only."""
    (tmp_path / "file").touch()
    word, end = f"data.root={folder}", "file: it is a file; name a folder"
    with pytest.raises(UserError, match=f"Cannot write to out=.*{end}"):
        written(weights, tmp_path / "file", word)
    with pytest.raises(UserError, match=r"Cannot write to out=.*below: Not a directory\."):
        written(weights, tmp_path / "file" / "below", word)

    def refuse(*given: Any, **settings: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"Cannot write to out=.*new: Read-only file system\."):
        written(weights, tmp_path / "new", word)


@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_a_full_disk_is_a_sentence(
    weights: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Whatever the library says of it, which may be numbers of items alone; no half part stays."""

    def write(table: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("32768 requested and 22496 written")

    monkeypatch.setitem(feature_files._WRITERS, form, write)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"train-00000-of-00001.* cannot be written \(the disk is"):
        written(weights, tmp_path / "out", f"data.root={folder}", f"file_format={form}")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "meta.json", ".bad"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"features": "foo"}, "^features=foo: it must be one of cls, mean_patch, patches"),
        ({"features": ["cls", 3]}, r"^features=\[cls, 3\]: it must be"),
        ({"blocks": True}, "^blocks=true: it must be a whole number"),
        ({"batch_size": 0}, "^batch_size=0: it must be a whole number of at least 1"),
        ({"num_workers": -1}, "^num_workers=-1: it must be"),
        ({"image_size": 0}, "^image_size=0: it must be"),
        ({"dtype": "float64"}, "^dtype=float64: it must be one of float32, float16"),
    ],
)
def test_impossible_arguments_are_called_as_the_function_does(
    weights: Path, folder: Path, settings: dict[str, Any], said: str
) -> None:
    """In Python."""
    with pytest.raises(UserError, match=said):
        inspect.unwrap(dino_lite.embed)(folder, weights, **settings)  # as users have it, unchecked


def test_everybody_may_read_features_as_other_files(
    weights: Path, folder: Path, tmp_path: Path
) -> None:
    """Also those of safetensors, which makes files for their owner alone."""
    before = os.umask(0o027)
    try:
        out = written(weights, tmp_path / "out", f"data.root={folder}", "file_format=safetensors")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir() if path.is_file()} == {0o640}


def test_parquet_without_its_library_is_a_sentence(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what installs it, and the format that needs none."""
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"dino-lite\[parquet\].*file_format=npy"):
        written(weights, tmp_path / "out", "file_format=parquet")


def vit(depth: int = 2) -> ViT:
    return ViT(image_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=2).eval()


class ClassOnly(ViT):
    """A network of another package without patch tokens or blocks."""

    def forward(self, *given: Any, **settings: Any) -> Tokens:
        tokens = super().forward(*given, **settings)
        return tokens._replace(patches=tokens.patches[:, :0])

    def intermediate(self, *given: Any) -> list[Tokens]:
        raise NotImplementedError


def test_what_a_network_lacks_is_a_sentence() -> None:
    """Patches, blocks, and the class token of earlier blocks of a compact export."""
    bare = ClassOnly(image_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    with pytest.raises(UserError, match="ClassOnly gives no patch tokens; ask for features=cls"):
        Embedder(bare, (16, 16), "mean_patch")
    with pytest.raises(UserError, match="ClassOnly gives no features of its blocks"):
        Embedder(bare, (16, 16), "cls", [0, 1])
    with pytest.raises(UserError, match=r"cls_block_0: .* \(compact=\), which do not fit"):
        Embedder(Compact(vit(), 4), (16, 16), "cls", 0)
    shapes = [c.shape for c in Embedder(Compact(vit(), 4), (16, 24), ["cls", "patches"]).columns]
    assert shapes == [(4,), (6, 16)]


def test_numbers_that_float16_does_not_hold_are_refused() -> None:
    """Instead of written as infinite; those of a diverged network say so."""
    backbone = vit()
    with torch.no_grad():
        backbone.norm.bias.fill_(1e5)
    half = Embedder(backbone, (16, 16), "cls", dtype="float16")
    with frozen(backbone), pytest.raises(UserError, match="cls has numbers above 65,504"):
        half.to_host(half(torch.zeros(1, 3, 16, 16)))
    with pytest.raises(UserError, match="diverged"):
        half.to_host({"cls": torch.tensor([[float("nan")]])})


def test_bfloat16_is_used_only_if_asked() -> None:
    """Close to float32, and not equal to it."""
    backbone, images = vit(), torch.randn(2, 3, 16, 16)
    with frozen(backbone):
        whole, again, half = (
            Embedder(backbone, (16, 16), "cls", bf16=bf16)(images)["cls"]
            for bf16 in (False, False, True)
        )
    assert torch.equal(whole, again)
    assert 0 < (whole - half).abs().max() < 0.1


@pytest.mark.parametrize(
    ("image_bytes", "most"), [(4 * 384, 4096), (4 * 196 * 768, 256), (2**30, 1)]
)
def test_parts_are_bounded_by_images_and_bytes(image_bytes: int, most: int) -> None:
    """Powers of two, so that batches fill them."""
    assert usual_part_images(image_bytes) == most


def test_python_takes_what_there_is(weights: Path, folder: Path) -> None:
    """Paths, PIL images, arrays, tensors, folders, alone or in a list: the same pixels give the
    same features.
    """
    path = folder / NAMES[0]
    image = Image.open(path)
    array = np.asarray(image)
    alone = dino_lite.embed(path, weights)
    assert alone.shape == (1, 32)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    several = [str(path), image, array, tensor, np.stack([array, array])]
    np.testing.assert_allclose(
        dino_lite.embed(several, weights), alone.repeat(6, axis=0), rtol=1e-4
    )
    found = dino_lite.embed([folder / "val/b", image], weights, ["cls", "patches"], blocks=[0, -1])
    assert found.name == [*(str(folder / name) for name in NAMES[9:]), "images[3]"]
    assert found._fields == ("name", "cls_block_0", "patches_block_0", "cls", "patches")
    np.testing.assert_allclose(found.cls[3:], alone, rtol=1e-4)


def turned() -> Image.Image:
    image = Image.new("RGB", (2, 4), (9, 8, 7))
    exif = image.getexif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    return image


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (turned(), (9, 8, 7)),
        (Image.new("RGBA", (4, 2), (9, 8, 7, 0)), (9, 8, 7)),
        (Image.new("RGB", (4, 2), (9, 8, 7)).quantize(2), (9, 8, 7)),
        (Image.new("LA", (4, 2), (9, 0)), (9, 9, 9)),
        (Image.new("1", (4, 2), 1), (255, 255, 255)),
        (Image.fromarray(np.full((2, 4), 65535, np.uint16)), (255, 255, 255)),
        (np.full((2, 4), 9, np.uint8), (9, 9, 9)),
        (np.full((2, 4, 1), 65535, np.uint16), (255, 255, 255)),
    ],
)
def test_images_in_memory_become_pixels_as_files_do(image: Any, pixel: tuple[int, ...]) -> None:
    """Upright, alpha dropped, gray to three channels, 16 bits to 8."""
    found = pixels_of(image)
    assert found.shape == (2, 4, 3)
    assert (found == pixel).all()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "no image to embed"),
        ([np.zeros((4, 4, 3), np.float32)], r"images\[0\] pixels are float32, of unknown range"),
        (np.zeros((3, 5, 5), np.uint8), r"images\[0\] has 5 channels, not 3"),
        ([3], r"images\[0\] is of type int"),
        (["nowhere.png"], r"nowhere.png cannot be read \(No such file"),
    ],
)
def test_what_is_no_image_is_a_sentence(weights: Path, images: Any, said: str) -> None:
    """Naming which of them."""
    with pytest.raises(UserError, match=said):
        dino_lite.embed(images, weights)


def blocks_of(text: str) -> Iterator[str]:
    yield from re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_documented_search_finds_the_image_itself(
    weights: Path,
    folder: Path,
    tmp_path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """docs/embed.md, over .npy of a folder, then by the function."""
    search, parquet, call = blocks_of((root / "docs/embed.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    written(
        weights, tmp_path / "features", f"data.root={folder}", "unit_length=true", "part_images=2"
    )
    capsys.readouterr()
    found: dict[str, Any] = {}
    exec(search, found)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"1.000 {found['names'][0]}"
    shutil.rmtree("features")
    words = [f"data.root={folder}", "unit_length=true", "part_images=2", "file_format=parquet"]
    written(weights, tmp_path / "features", *words)
    by_numpy = found["cls"]
    exec(parquet, found)
    order = [*map(found["table"]["name"].to_pylist().index, found["names"])]
    np.testing.assert_array_equal(found["cls"][order], by_numpy)
    shutil.copy(found["names"][0], "query.jpg")
    shutil.copytree(folder / "val/b", "folder")
    exec(call.replace("CHECKPOINT", str(weights)), found)
    assert found["both"].patches.shape == (3, 4, 32)
    np.testing.assert_allclose(found["cls"] @ found["query"], found["cosines"], atol=1e-4)
