"""A list of image files, in any of its formats, is a source."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from dino_lite.config import compose, instantiate
from dino_lite.data import files as files_module
from dino_lite.data.auto import open_auto
from dino_lite.data.facts import read_facts
from dino_lite.data.files import open_files
from images import GREEN, classes, fill, names, sentence
from servers import png


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    """A list."""
    path.write_bytes(text.encode(encoding))
    return path


def parquet(file: Path, /, **columns: list[Any]) -> Path:
    """A Parquet table, in row groups of two."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), file, row_group_size=2)
    return file


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_a_text_file(tmp_path: Path) -> None:
    """A path in each line, in this order; blank ones and comments are none; any suffix will do."""
    fill(tmp_path / "pics", "b.png", "a b.png")
    (tmp_path / "pics" / "b.png").rename(tmp_path / "pics" / "b")
    text = f"# mine\r\n\npics/b\n  {tmp_path}/pics/a b.png\n#pics/c.png\n"
    splits = open_auto(str(written(tmp_path / "mine.txt", text, "utf-8-sig")))
    assert (names(splits.train), splits.test, splits.name) == (["b", "a b.png"], None, "mine")
    assert splits.train.labels is None
    assert all(tuple(splits.train.read(i)[0, 0]) == GREEN for i in range(2))
    assert splits.train.image_size(0) == (4, 6)  # type: ignore[attr-defined]
    assert read_facts(splits)[:5] == (2, 0, 0, 4, 6)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "path,label,split\n1.png,x,train\n2.png,y,train\n3.png,y,val\n"),
        ("l.csv", "who,Split, Path ,label\nme,train,1.png,x\n,train,2.png,y\nme,val,3.png,y\n"),
        ("l.csv", "1.png,x,train\n\n 2.png , y ,train\n3.png,y,test\n"),
        ("l.csv", '"1.png",x,train\n2.png,"y",train\n3.png,y,val\n9.png,z,test\n'),
        ("l.tsv", "path\tlabel\tsplit\n1.png\tx\ttrain\n2.png\ty\ttrain\n3.png\ty\ttest\n"),
        ("l.TSV", "1.png\tx\ttrain\n2.png\ty\ttrain\n3.png\ty\ttest"),
    ],
)
def test_csv_and_tsv(tmp_path: Path, name: str, text: str) -> None:
    """With a heading, columns in any order, or without; val is the test split before test."""
    splits = open_auto(written(tmp_path / name, text, "utf-8-sig"))
    assert (names(splits.train), names(splits.test)) == (["1.png", "2.png"], ["3.png"])
    assert (classes(splits.train), classes(splits.test)) == (["x", "y"], ["y"])
    assert open_auto(tmp_path / name, labels="none").train.labels is None


def test_parquet(tmp_path: Path) -> None:
    """Integers are classes in the order of numbers; a missing column is no mistake."""
    paths = [f"{i}.png" for i in range(5)]
    split = ["train", "train", "val", "train", "train"]
    table = parquet(
        tmp_path / "t.parquet", path=paths, label=[10, 9, 9, 10, 2], split=split, n=paths
    )
    splits = open_auto(table)
    assert names(splits.train) == ["0.png", "1.png", "3.png", "4.png"]
    assert classes(splits.train) == ["10", "9", "10", "2"]
    assert splits.train.classes == ["2", "9", "10"]
    assert classes(splits.test) == ["9"]
    bare = open_auto(parquet(tmp_path / "u.parquet", path=paths))
    assert (len(bare.train), bare.train.labels, bare.test) == (5, None, None)


def test_relative_paths_are_relative_to_the_list_or_to_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not to the working folder; the list may move with its images."""
    fill(tmp_path, "here/a.png", "there/a.png", "there/b.png")
    one, two = (written(tmp_path / place / "l.csv", "a.png\n") for place in ("here", "there"))
    monkeypatch.chdir(tmp_path / "there")
    source = open_files(one).train
    assert source.name(0) == str(tmp_path / "here" / "a.png")
    assert open_files("l.csv").train.name(0) == str(tmp_path / "there" / "a.png")
    assert open_files(two).train.digest() == source.digest()
    written(tmp_path / "here" / "l.csv", "b.png\n")
    assert open_files(one).train.digest() != source.digest()
    assert open_files(one, base=tmp_path / "there").train.read(0).shape == (4, 6, 3)


def test_urls_are_read_and_have_their_list_beside_them(memory: Any, tmp_path: Path) -> None:
    """A list by URL, its relative paths by URL, a file:// and a local one; after pickling too."""
    fill(tmp_path, "local.png", "é ü.png")
    memory.pipe("/set/pics/a.png", png())
    memory.pipe("/top.png", png())
    rows = f"pics/a.png\nmemory://top.png\n{tmp_path}/local.png\nfile://{tmp_path}/é ü.png\n"
    memory.pipe("/set/list.txt", rows.encode())
    splits = open_auto("memory://set/list.txt")
    source = pickle.loads(pickle.dumps(splits.train))
    assert splits.name == "list"
    assert source.name(0) == "memory://set/pics/a.png"
    assert all(np.array_equal(source.read(i), source.read(0)) for i in range(4))
    memory.pipe("/list.txt", b"top.png\n")
    assert open_auto("memory://list.txt").train.read(0).shape == (4, 6, 3)
    local = written(tmp_path / "l.txt", "pics/a.png\n")
    assert open_files(local, base="memory://set").train.read(0).shape == (4, 6, 3)


def test_what_is_not_there_is_the_images_fault(memory: Any, tmp_path: Path) -> None:
    """An image that is missing, or none, is found when it is read: a list is not checked."""
    memory.pipe("/text.jpg", b"hello")
    listed = written(tmp_path / "l.txt", "gone.png\nmemory://gone.png\nmemory://text.jpg\n")
    source = open_files(listed).train
    for i in range(3):
        with pytest.raises(OSError, match=r"No such file|FileNotFoundError|no image"):
            source.read(i)


def test_the_configuration_of_a_list(tmp_path: Path) -> None:
    """`data=files` takes storage options by name, and channels."""
    fill(tmp_path, "a.png", "b.png")
    listed = written(tmp_path / "l.csv", "a.png,1\nb.png,2\n")
    overrides = ["data=files", f"data.root={listed}", "data.channels=1"]
    config = compose("pretrain", [*overrides, "+data.storage_options.anon=true"])
    source = instantiate(config["data"]).train
    assert source.opener.options == {"anon": True}
    assert source.read(0).shape == (4, 6, 1)
    assert classes(source) == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("l.txt", "# nothing\n", "lists no image"),
        ("l.csv", "path,label\n", "lists no image"),
        ("l.csv", "a.png,x,val\n", "no image of the split train"),
        ("l.csv", "a.png,x,valid\n", "no image of the split train, as its column has 'valid'"),
        ("l.csv", "a.png,x,\n", "as its column has ''"),
        ("l.csv", "who,label\nme,1\n", "no column path"),
        ("l.csv", "a.png,1,train,me\n", "no heading"),
        ("l.csv", "path,label\na.png\n", "Row 2 of"),
        ("l.csv", "path,label\na.png,1\n,2\n", "Row 3 of"),
        ("l.csv", "a.png,1\nb.png,\nc.png,2\n", "no label for 1 of 3 images"),
        ("l.csv", "a.png,1,train\nb.png,1,val\nc.png,,val\n", "no label for 1 of 2 images"),
        ("l.txt", "nosuch://a/b.png\n", "nosuch:// is not a protocol"),
        ("l.parquet", "path", "cannot be read as a list"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, name: str, text: str, told: str) -> None:
    """One sentence that says what is wrong, and in which list."""
    listed = written(tmp_path / name, text)
    assert told in (said := sentence(open_auto, listed))
    assert str(listed) in said or "protocol" in said


def test_other_mistakes(tmp_path: Path, memory: Any) -> None:
    """Lists that are not there, labels of another kind, tables without paths."""
    (tmp_path / "d.csv").mkdir()
    listed = written(tmp_path / "l.csv", "a.png\n")
    assert "does not exist" in sentence(open_auto, tmp_path / "gone.csv")
    assert "does not exist" in sentence(open_files, tmp_path / "gone.csv")
    assert "is a folder" in sentence(open_files, tmp_path / "d.csv")
    assert "is not a list" in sentence(open_files, tmp_path / "a.xlsx")
    assert "data.labels=folder" in sentence(open_auto, listed, labels="folder")
    assert "FileNotFoundError" in sentence(open_auto, "memory://gone.csv")
    assert "cannot be listed" in sentence(open_auto, "s3://bucket/folder")
    assert "path_column" in sentence(open_auto, parquet(tmp_path / "t.parquet", file=["a"]))
    assert "Row 2 of" in sentence(open_auto, parquet(tmp_path / "t.parquet", path=["a.png", None]))
    assert "data.root is not set" in sentence(open_files)


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the extra that brings it."""
    import builtins

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("s3fs", "gcsfs", "aiohttp", "pyarrow"):
            raise ImportError(f"no {name}")
        return load(name, *args, **kwargs)

    def get_class(protocol: str) -> Any:
        raise ImportError(f"install what {protocol} needs")

    table = parquet(tmp_path / "t.parquet", path=["a"])
    load = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(fsspec, "get_filesystem_class", get_class)
    for protocol, extra in (("s3", "s3"), ("gs", "gcs"), ("https", "http")):
        listed = written(tmp_path / "l.txt", f"{protocol}://x/y.png\n")
        assert f"pip install 'dino-lite[{extra}]'" in sentence(open_files, listed)
    assert "install what smb needs" in sentence(open_files, written(listed, "smb://x/y.png\n"))
    assert "pip install 'dino-lite[parquet]'" in sentence(open_files, table)


def test_a_secret_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are saved with a run: a secret in them is refused, the name of a variable is not."""
    listed = written(tmp_path / "l.txt", "a.png\n")
    for options in ({"secret": "s"}, {"client_kwargs": {"aws_session_token": "t"}}):
        told = sentence(open_files, listed, storage_options=options)
        assert "$NAME" in told
    public = {"key": "k", "secret": "$MY_SECRET", "token": "anon", "n": 3}
    source = open_files(listed, storage_options=public).train
    monkeypatch.setenv("MY_SECRET", "s3cret")
    assert b"s3cret" not in pickle.dumps(source)
    assert files_module.Remote(public).options == public


# ------------------------------------------------------------------ columns as people name them


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("id,breed\n1.png,x\n2.png,y\n", ["x", "y"]),
        ("image;species\n1.png;x\n2.png;y\n", ["x", "y"]),
        ("id\tfile_name\tlabel\n7\t1.png\tx\n8\t2.png\ty\n", ["x", "y"]),
        ("foto,quality,class\n1.png,3,x\n2.png,4,y\n", ["x", "y"]),
        ("label,image_id\nx,1.png\ny,2.png\n", ["x", "y"]),
        ("image,mask,label\n1.png,m1.png,x\n2.png,m2.png,y\n", ["x", "y"]),
        ("name,what\n1.png,x\n2.png,y\n", None),
        ("1.png;x\n2.png;y\n", ["x", "y"]),
    ],
)
def test_headings_that_people_write(tmp_path: Path, text: str, found: list[str] | None) -> None:
    """A heading is never an image; any usual separator."""
    fill(tmp_path, "1.png", "2.png")
    text += text[text.index("\n1.png" if "\n1.png" in text else "\n") + 1 :] if found else ""
    splits = open_auto(written(tmp_path / "l.csv", text))
    assert set(names(splits.train)) == {"1.png", "2.png"}
    assert sorted(set(classes(splits.train) or [])) == (found or [])
    if not found:
        assert "data.label_column" in splits.labels_from
        named = open_auto(tmp_path / "l.csv", label_column="what")
        assert classes(named.train) == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("first,second\na,b\nc,d\nlast,x\n", "data.path_column"),
        ("file,image\n1.png,2.png\n", "data.path_column"),
        ("who,when\nme,1.png\n", ""),
        ("image_id,id\n12,13\n", "data.path_column"),
        ("id,label\n12,x\n", "data.path_column"),
        ("path,class,species\n1.png,x,y\n", "data.label_column"),
    ],
)
def test_columns_that_are_not_clear_are_refused(tmp_path: Path, text: str, key: str) -> None:
    """Naming the key; an unknown heading over paths is understood."""
    fill(tmp_path, "1.png", "2.png")
    listed = written(tmp_path / "l.csv", text)
    if key:
        assert key in sentence(open_auto, listed)
        if "label" in key:
            assert len(open_auto(listed, label_column="species").train) == 1
            assert "is no column" in sentence(open_auto, listed, label_column="genus")
    else:
        assert names(open_auto(listed).train) == ["1.png"]


def test_a_column_of_splits_in_any_words(tmp_path: Path) -> None:
    """What is neither train nor the test split is counted, and can be chosen."""
    rows = [("training", 3), ("validation", 2), ("test", 1), ("unlabeled", 4)]
    text = "path,split\n" + "".join(f"{s}{i}.png,{s}\n" for s, n in rows for i in range(n))
    listed = written(tmp_path / "l.csv", text)
    splits = open_auto(listed)
    assert (len(splits.train), len(splits.test or [])) == (3, 2)
    assert splits.left_out[0].startswith("5 images were left out (split test, unlabeled)")
    other = open_auto(listed, train="unlabeled", test="test")
    assert (len(other.train), len(other.test or [])) == (4, 1)
    assert "data.train" in sentence(open_auto, written(listed, "path,split\na.png,x\nb.png,y\n"))


def test_folders_of_a_list_are_its_splits_and_classes(tmp_path: Path) -> None:
    """Where it has no column of them; also for URLs and absolute paths."""
    for start in ("", "/data/set/", "https://host/bucket/"):
        files = [f"{start}{s}/{c}/{i}.png" for s in ("train", "val") for c in "ab" for i in (1, 2)]
        splits = open_auto(written(tmp_path / "l.txt", "\n".join(files)))
        assert classes(splits.train) == classes(splits.test) == ["a", "a", "b", "b"]
        assert [splits.train.name(i).endswith(files[i]) for i in range(4)] == [True] * 4
        every = open_auto(tmp_path / "l.txt", train=".", test="none")
        assert (len(every.train), every.test) == (8, None)


def test_latin1_csv_is_read(tmp_path: Path) -> None:
    """Labels can be printed, and paths are those of the files."""
    fill(tmp_path, "é.png", "a.png")
    text = "path,label\né.png,Müller\na.png,x\né.png,Müller\na.png,x\n"
    splits = open_auto(written(tmp_path / "l.csv", text, "latin-1"))
    assert splits.train.classes == ["Müller", "x"]
    assert splits.train.read(0).shape == (4, 6, 3)
    "".join([*splits.train.classes, splits.labels_from, splits.train.name(0)]).encode()
    assert open_auto(written(tmp_path / "l.csv", text, "utf-16")).train.classes == ["Müller", "x"]


def test_names_without_their_suffix(tmp_path: Path) -> None:
    """Ids whose files are there with a suffix; what names no file is refused, not trained on."""
    fill(tmp_path, "00ab.png", "01cd.png", "train/02ef.jpg")
    ids = written(tmp_path / "l.csv", "id,breed\n00ab,pug\n01cd,boxer\n00ab,pug\n01cd,boxer\n")
    splits = open_auto(ids)
    assert names(splits.train)[:2] == ["00ab.png", "01cd.png"]
    assert splits.train.classes == ["boxer", "pug"]
    for text in ("ImageID,LabelName\nx1,cat\n", "images/a.jpg 0\n", "path\n"):
        told = sentence(open_auto, written(tmp_path / "l.txt", text))
        assert "there is no such file" in told
        assert "data.base=" in told
    assert "data.path_column" in sentence(open_auto, written(ids, "who,img_name\nme,x1\n"))
    below = open_files(written(tmp_path / "m.csv", "id\n02ef\n"), base=tmp_path / "train")
    assert names(below.train) == ["02ef.jpg"]


def test_columns_that_mean_something_else(tmp_path: Path) -> None:
    """A set or partition is one of splits only if its values are; patterns take all that match."""
    rows = [(f"{i}.png", word) for i, word in enumerate(("train1", "train2", "val", "extra"))]
    text = "path,{}\n" + "".join(f"{path},{word}\n" for path, word in rows)
    listed = written(tmp_path / "l.csv", text.format("split"))
    assert names(open_auto(listed).train) == ["0.png", "1.png"]
    assert names(open_auto(listed, train="[train*,extra]").train) == ["0.png", "1.png", "3.png"]
    every = open_auto(listed, train=".", test="none")
    assert (len(every.train), every.left_out) == (4, ())
    assert "no image of the split train" in sentence(open_auto, listed, test=".")
    told = open_auto(listed).left_out[0]
    assert "data.train='[train1,train2,extra]'" in told
    other = written(listed, "path,set\n0.png,coco\n1.png,flickr\n")
    assert len(open_auto(other).train) == 2
    assert len(open_auto(written(listed, text.format("set"))).train) == 4
    lone = written(listed, "path,split\n0.png,train\n1.png,extra\n")
    assert "None" not in open_auto(lone).left_out[0]


@pytest.mark.parametrize(
    "text",
    [
        "image|label\n1.png|x\n2.png|y\n",
        "# comment\npath,label\n1.png,x\n2.png,y\n",
        "Path,Frontal/Lateral,class\n1.png,F,x\n2.png,L,y\n",
        "image_name;Class Name\n1.png;x\n2.png;y\n",
    ],
)
def test_dialects(tmp_path: Path, text: str) -> None:
    """The heading is understood, and no image."""
    fill(tmp_path, "1.png", "2.png")
    splits = open_auto(written(tmp_path / "l.csv", text + text.split("\n", 2)[-1]))
    assert set(names(splits.train)) == {"1.png", "2.png"}
    if "#" not in text:
        assert splits.train.classes == ["x", "y"]
