"""Tar shards: read where images lie, written and read by WebDataset's own library too."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lite.contracts import Splits
from dino_lite.data import order, pack
from dino_lite.data.auto import open_auto
from dino_lite.data.byte_ranges import expand_braces
from dino_lite.data.crops import MultiCrop
from dino_lite.data.datamodule import DataModule
from dino_lite.data.folder import open_folder
from dino_lite.data.layout import split_files
from dino_lite.data.pack import write_shards
from dino_lite.data.photometric import Normalize
from dino_lite.data.shards import open_shards
from dino_lite.data.sources import ArraySource
from images import classes, sentence


def encoded(color: int, kind: str = "PNG") -> bytes:
    """A small image as a file."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (color, 255 - color, 0)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar file of these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            tar.addfile(item, io.BytesIO(content))
    return path


def photos(root: Path, num: int = 10) -> Path:
    """A folder of two classes in two splits, every image another color; one suffix in capitals."""
    for i in range(num):
        for split, first in (("train", 0), ("val", 100)):
            name = f"{split}/{'ab'[i % 2]}/{i:02}.{'png' if i else 'PNG'}"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(encoded(first + i))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes are cached below the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dino_lite" / "shards"


def contents(source: Any) -> dict[bytes, str | None]:
    """The class of each image by its bytes."""
    labels = classes(source) or [None] * len(source)
    return {source.encoded(i)[0]: labels[i] for i in range(len(source))}


def test_a_folder_comes_back_from_its_shards(tmp_path: Path) -> None:
    """Every byte, class and split; several shards, deterministic to the byte, mixed."""
    folder = open_folder(photos(tmp_path / "photos"))
    heard: list[int] = []
    written = write_shards(folder, tmp_path / "packed", 20_000, heard.append)
    assert sum(heard) == 20
    assert len(written) > 2
    assert [path.name for path in written[:2]] == ["train-000000.tar", "train-000001.tar"]
    assert all(path.stat().st_size <= 20_480 for path in written)
    opened = open_shards(tmp_path / "packed")
    assert opened.name == "packed"
    assert opened.test is not None
    for ours, theirs in zip(opened[:2], folder[:2], strict=True):
        assert contents(ours) == contents(theirs)
        assert ours.classes == ["a", "b"]
    assert len(set(classes(opened.train)[:4])) == 2  # type: ignore[index]
    again = write_shards(folder, tmp_path / "again", 20_000)
    assert [a.read_bytes() for a in again] == [b.read_bytes() for b in written]
    assert open_shards(tmp_path / "again").train.digest() == opened.train.digest()


def test_pixels_sizes_names_and_groups(tmp_path: Path) -> None:
    """What a source offers; after pickling too, as a spawned worker gets it."""
    folder = open_folder(photos(tmp_path / "photos"))
    write_shards(folder, tmp_path / "packed", 20_000)
    source = pickle.loads(pickle.dumps(open_shards(tmp_path / "packed").train))
    for i in range(len(source)):
        key = Path(source.name(i)).stem
        assert np.array_equal(source.read(i), folder.train.read(int(key)))
        assert source.image_size(i) == (4, 6)
        assert source.encoded(i)[1] == ".png"
    assert source.groups[0] == 0
    assert source.groups[-1] == 10
    assert len(source.groups) - 1 == len({Path(source.name(i)).parent for i in range(10)})


def test_shards_of_the_webdataset_library_are_read(tmp_path: Path) -> None:
    """Keys, bytes and labels as its ShardWriter has written them, from .cls and from .json."""
    wds = pytest.importorskip("webdataset")
    (tmp_path / "cls").mkdir()
    with wds.ShardWriter(f"{tmp_path}/cls/train-%06d.tar", maxcount=4, verbose=0) as sink:
        for i in range(10):
            sink.write({"__key__": f"dir/k{i:03}", "jpg": encoded(i, "JPEG"), "cls": i % 3})
    (tmp_path / "json").mkdir()
    with wds.TarWriter(f"{tmp_path}/json/all.tar") as sink:
        for i in range(10):
            about = {"label": "cat" if i % 2 else "dog", "width": 6}
            sink.write({"__key__": f"k{i:03}", "json": about, "webp": encoded(i, "WEBP")})
    source = open_shards(tmp_path / "cls").train
    assert [source.encoded(i) for i in range(10)] == [
        (encoded(i, "JPEG"), ".jpg") for i in range(10)
    ]
    assert classes(source) == [str(i % 3) for i in range(10)]
    assert source.groups.tolist() == [0, 4, 8, 10]
    assert source.name(5) == f"{tmp_path}/cls/train-000001.tar/dir/k005.jpg"
    named = open_shards(tmp_path / "json" / "all.tar").train
    assert classes(named) == ["dog", "cat"] * 5
    assert named.encoded(9) == (encoded(9, "WEBP"), ".webp")


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_the_webdataset_library_reads_ours(tmp_path: Path) -> None:
    """Keys, bytes and labels."""
    wds = pytest.importorskip("webdataset")
    folder = open_folder(photos(tmp_path / "photos"))
    written = write_shards(folder, tmp_path / "packed", 20_000)
    train = [str(path) for path in written if path.name.startswith("train")]
    stream = wds.WebDataset(train, shardshuffle=False, empty_check=False)
    found = {sample["__key__"]: (sample["png"], int(sample["cls"])) for sample in stream}
    del stream
    gc.collect()  # it leaves its files open
    assert folder.train.labels is not None
    assert found == {
        f"{i:09d}": (folder.train.encoded(i)[0], int(folder.train.labels[i])) for i in range(10)
    }


def test_what_counts_as_an_image(tmp_path: Path) -> None:
    """One image a key, unless only further dots tell them apart; notes and stray files are none."""
    write_tar(
        tmp_path / "a.tar",
        {
            "__notes__/x.jpg": b"",
            "one.json": b"[1]",
            "one.seg.png": encoded(1),
            "one.jpg": encoded(2, "JPEG"),
            "./two.left.PNG": encoded(3),
            "./two.right.png": encoded(4),
            "three.txt": b"no image",
            "README": b"",
            "d.ots/.hidden.png": encoded(5),
            "d.ots/four.JPEG": encoded(6, "JPEG"),
        },
    )
    source = open_shards(tmp_path / "a.tar").train
    found = [source.name(i).partition("a.tar/")[2] for i in range(len(source))]
    assert found == ["one.jpg", "two.left.PNG", "two.right.png", "d.ots/four.JPEG"]
    assert source.labels is None


def test_images_without_a_label_are_known_as_such(tmp_path: Path) -> None:
    """-1, as evaluations leave them out; one class alone is none."""
    members = {f"{i}.png": encoded(i) for i in range(4)}
    labels = {"1.cls": b"7", "2.cls": b" 12\n"}
    both = dict(sorted({**members, **labels}.items()))
    source = open_shards(write_tar(tmp_path / "a.tar", both)).train
    assert source.labels is not None
    assert source.labels.tolist() == [-1, 0, 1, -1]
    assert source.classes == ["7", "12"]
    del both["2.cls"]
    assert open_shards(write_tar(tmp_path / "b.tar", both)).train.labels is None


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["train/0.tar", "val/0.tar", "test/0.tar"], ["train/0.tar"], ["val/0.tar"]),
        (["a-train-00", "a-test-00"], ["a-train-00"], ["a-test-00"]),
        (["train-0", "validation-0"], ["train-0"], ["validation-0"]),
        (["TRAIN_0", "Val_0"], ["TRAIN_0"], ["Val_0"]),
        (["trainer-0", "contest-0"], ["trainer-0", "contest-0"], []),
        (["train-0", "extra-0"], ["train-0", "extra-0"], []),
        (["val-0"], ["val-0"], []),
    ],
)
def test_splits_by_name(names: list[str], train: list[str], test: list[str]) -> None:
    """As with folders: train beside val or else test, or all of them."""
    assert split_files(dict.fromkeys(names, 1))[:2] == (train, test)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_tree_in_tars_is_read_as_the_same_tree_on_disk(tmp_path: Path, num_shards: int) -> None:
    """Splits, classes and masks by the folders in them, whichever shards they lie in."""
    folder = photos(tmp_path / "photos")
    (folder / "train" / "a" / "masks").mkdir()
    for number in (0, 2, 4):
        (folder / "train" / "a" / "masks" / f"{number:02}.png").write_bytes(encoded(200))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.[pP]*"))
    for shard in range(num_shards):
        members = {str(f): (folder / f).read_bytes() for f in files[shard::num_shards]}
        write_tar(tmp_path / "tars" / f"part-{shard}.tar", members)
    on_disk, packed = open_folder(folder), open_auto(tmp_path / "tars")
    assert contents(packed.train) == contents(on_disk.train)
    assert contents(packed.test) == contents(on_disk.test)
    assert packed.labels_from == on_disk.labels_from == "the folders a, b"
    assert packed.left_out[0].startswith("3 images were left out as masks or annotations")
    every = open_auto(tmp_path / "tars", train=".", test="none", exclude="none")
    assert (len(every.train), every.test) == (23, None)


def test_folders_in_shards_of_splits_are_classes(tmp_path: Path) -> None:
    """Names of shards never are; labels in the shards take precedence over folders."""
    pictures = {f"{c}/{i}.png": encoded(i + 10 * (c == "b")) for c in "ab" for i in (1, 2)}
    for name in ("set-train-000", "set-train-001", "set-val-000", "more"):
        write_tar(tmp_path / "tars" / f"{name}.tar", pictures)
    splits = open_shards(tmp_path / "tars")
    assert classes(splits.train) == ["a", "a", "b", "b"] * 2
    assert classes(splits.test) == ["a", "a", "b", "b"]
    assert splits.left_out[0].startswith("4 images were left out (more)")
    chosen = open_shards(tmp_path / "tars", train="more", test="*val*")
    assert (len(chosen.train), len(chosen.test or [])) == (4, 4)
    assert len(open_shards(tmp_path / "tars", exclude="*train-001*").train) == 4
    told = sentence(open_shards, tmp_path / "tars", train="none_such")
    assert "data.train=none_such" in told
    labeled = {"a/1.png": encoded(1), "a/1.cls": b"7", "b/1.png": encoded(2), "b/1.cls": b"9"}
    write_tar(tmp_path / "tars" / "set-train-000.tar", labeled)
    assert open_shards(tmp_path / "tars", train="*train-000").train.classes == ["7", "9"]


def test_braces() -> None:
    """Counting keeps leading zeros, lists may hold counts."""
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{9..10}") == ["9", "10"]
    assert expand_braces("{t-{0..1},v}/x{a,b}") == [
        *("t-0/xa", "t-0/xb", "t-1/xa", "t-1/xb", "v/xa", "v/xb")
    ]
    assert expand_braces("odd{.tar") == ["odd{.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_a_pattern_names_shards(tmp_path: Path) -> None:
    """Of one folder or several; one that is not there is named."""
    for i in range(3):
        write_tar(tmp_path / "train" / f"{i:03}.tar", {f"{i}.png": encoded(i)})
    write_tar(tmp_path / "val" / "000.tar", {"v.png": encoded(9)})
    opened = open_shards(tmp_path / "train" / "{001..002}.tar")
    assert len(opened.train) == 2
    assert opened.test is None
    both = open_shards(f"{tmp_path}/{{train/{{000..002}},val/000}}.tar")
    assert (len(both.train), len(both.test or [])) == (3, 1)
    told = sentence(open_shards, tmp_path / "train" / "{002..003}.tar")
    assert "003.tar cannot be read" in told


def test_index_is_cached_until_the_shard_changes(tmp_path: Path, cache: Path) -> None:
    """Headers are read once; a shard written anew is read anew, a damaged cache is no matter."""
    path = write_tar(tmp_path / "data" / "a.tar", {"0.png": encoded(0), "1.png": encoded(1)})
    before = open_shards(path).train
    (stored,) = cache.iterdir()
    written = stored.stat().st_mtime_ns
    assert open_shards(path.parent).train.digest() == before.digest()
    assert stored.stat().st_mtime_ns == written
    stored.write_bytes(b"damaged")
    assert open_shards(path).train.digest() == before.digest()
    write_tar(path, {"0.png": encoded(0), "2.png": encoded(2)})
    os.utime(path, ns=(1, 1))
    after = open_shards(path).train
    assert after.name(1).endswith("2.png")
    assert after.digest() != before.digest()


def test_without_a_cache_folder_headers_are_read_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user without a home, as containers have it, and a folder that is a file."""
    path = write_tar(tmp_path / "a.tar", {"0.png": encoded(0)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    assert len(open_shards(path).train) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert len(open_shards(path).train) == 1


def test_a_stale_index_beside_shards_is_not_used(tmp_path: Path) -> None:
    """It knows the sizes of its shards."""
    packed = tmp_path / "packed"
    write_shards(open_folder(photos(tmp_path / "photos")), packed)
    opened = open_shards(packed)
    write_tar(packed / "train-000000.tar", {f"{i}.png": encoded(i) for i in range(50)})
    assert len(opened.train) == 10
    assert len(open_shards(packed).train) == 50
    write_tar(packed / "train-000001.tar", {"more.png": encoded(0)})
    assert len(open_shards(packed).train) == 51


def test_shards_that_cannot_be_used(tmp_path: Path) -> None:
    """One sentence each: compressed, cut, no tar, without images, not there."""
    whole = write_tar(tmp_path / "a.tar", {f"{i}.png": encoded(i) for i in range(9)}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:5000])
    told = sentence(open_shards, tmp_path / "cut.tar")
    assert "cut.tar is not a complete tar file" in told
    assert "after 4 images" in told
    for torn in (whole[:4196], whole[:4096] + b"x" * 512 + whole[4608:]):
        (tmp_path / "torn.tar").write_bytes(torn)
        assert "(damaged header, after 4 images)" in sentence(open_shards, tmp_path / "torn.tar")
    (tmp_path / "endless.tar").write_bytes(whole.rstrip(b"\0").ljust(9 * 1024, b"\0"))
    assert len(open_shards(tmp_path / "endless.tar").train) == 9  # as tar itself takes it
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.add(tmp_path / "a.tar")
    assert "gunzip" in sentence(open_shards, tmp_path / "zipped.tar")
    assert "gunzip" in sentence(open_shards, tmp_path / "a.tar.gz")
    (tmp_path / "text.tar").write_bytes(b"no tar file" * 1000)
    assert "is not a complete tar file" in sentence(open_shards, tmp_path / "text.tar")
    write_tar(tmp_path / "notes.tar", {"a.txt": b"text"})
    assert "has no image" in sentence(open_shards, tmp_path / "notes.tar")
    (tmp_path / "empty").mkdir()
    assert "holds no .tar file" in sentence(open_shards, tmp_path / "empty")
    assert "holds no .tar file" in sentence(open_shards, tmp_path / "nowhere")
    assert "data.root is not set" in sentence(open_shards)


def test_a_shard_cut_during_the_run_costs_its_images_only(tmp_path: Path) -> None:
    """OSError for what is gone, as of any file that vanished."""
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": encoded(i) for i in range(3)})
    source = open_shards(path).train
    os.truncate(path, 2000)
    assert source.read(0).shape == (4, 6, 3)
    with pytest.raises(OSError, match=r"a\.tar gave"):
        source.read(2)
    path.unlink()
    with pytest.raises(OSError, match=r"a\.tar"):
        source.read(0)


def test_packing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    """A target that holds something is refused; an interrupted one leaves nothing behind."""
    folder = open_folder(photos(tmp_path / "photos"))
    target = tmp_path / "packed"
    target.mkdir()

    def stop(num: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, target, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "photos"]
    write_shards(folder, target)
    assert "not empty" in sentence(write_shards, folder, target)
    assert "not empty" in sentence(write_shards, folder, tmp_path / "packed" / "index.npz")
    assert "cannot be written" in sentence(write_shards, folder, target / "index.npz" / "x")


def test_files_that_cannot_be_read_are_left_out_and_listed(tmp_path: Path) -> None:
    """Packing goes on without them."""
    folder = open_folder(photos(tmp_path / "photos"))
    (tmp_path / "photos/train/a/02.png").unlink()
    write_shards(folder, tmp_path / "packed")
    assert len(open_shards(tmp_path / "packed").train) == 9
    assert "02.png" in (tmp_path / "packed" / pack.LEFT_OUT).read_text()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_arrays_are_packed_without_loss(tmp_path: Path, channels: int) -> None:
    """As PNG, or .npy where PNG has no such channels; an image without a label stays so."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4, channels), np.uint8)
    labels = np.array([0, 1, -1, 0, 1, -1])
    arrays = ArraySource(torch.from_numpy(pixels), labels, ["x", "ü"], "x")
    write_shards(Splits(arrays, None, "x"), tmp_path / "packed")
    source = open_shards(tmp_path / "packed", channels).train
    keys = [int(Path(source.name(i)).stem) for i in range(6)]
    assert sorted(keys) == list(range(6))
    assert all(np.array_equal(source.read(i), pixels[key]) for i, key in enumerate(keys))
    assert source.labels is not None
    assert source.labels.tolist() == labels[keys].tolist()
    assert source.classes == ["x", "ü"]
    assert json.loads((tmp_path / "packed/classes.json").read_text("utf-8")) == ["x", "ü"]


def test_shards_hold_a_limited_number_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are small; and an image larger than a shard has one of its own."""
    folder = open_folder(photos(tmp_path / "photos"))
    monkeypatch.setattr(pack, "MAX_IMAGES", 4)
    write_shards(folder, tmp_path / "few")
    assert open_shards(tmp_path / "few").train.groups.tolist() == [0, 4, 8, 10]
    write_shards(folder, tmp_path / "one", max_bytes=1)
    assert open_shards(tmp_path / "one").train.groups.tolist() == list(range(11))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_is_resumed_sees_the_same_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """Bit by bit from the middle of an epoch on, whatever the number of workers."""
    monkeypatch.setattr(order, "WINDOW", 4)
    monkeypatch.setattr(order, "MIN_GROUPS", 1)
    monkeypatch.setattr(pack, "MAX_IMAGES", 3)
    write_shards(open_folder(photos(tmp_path / "photos")), tmp_path / "packed")
    splits = open_shards(tmp_path / "packed")

    def crops(start: int, workers: int) -> list[torch.Tensor]:
        data = DataModule(
            splits, MultiCrop(8, 4, 2), Normalize(), batch_size=4, num_workers=workers, num_steps=8
        )
        loader = data.train_dataloader()
        loader.start = lambda: start
        return [part[0].globals_ for part in loader]

    whole = crops(0, 0)
    assert len(whole) == 8
    resumed = crops(3, num_workers)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole[3:], strict=True))


def test_auto_knows_shards(tmp_path: Path) -> None:
    """A .tar, a pattern, and a folder that holds more images in shards than beside them."""
    write_shards(open_folder(photos(tmp_path / "photos")), tmp_path / "packed")
    for root in ("packed", "packed/train-000000.tar", "packed/train-{000000..000000}.tar"):
        assert len(open_auto(tmp_path / root).train) == 10
    (tmp_path / "packed" / "a.png").write_bytes(encoded(0))
    beside = open_auto(tmp_path / "packed")
    assert (type(beside.train).__name__, len(beside.train)) == ("ShardSource", 10)
    assert beside.left_out[0].startswith("1 image was left out (a.png)")
    assert "data.root=" in beside.left_out[0]
    photos(tmp_path / "packed", 11)
    beside = open_auto(tmp_path / "packed")
    assert (type(beside.train).__name__, len(beside.train)) == ("PathSource", 11)
    assert any("left out (test-000000.tar)" in sentence for sentence in beside.left_out)
