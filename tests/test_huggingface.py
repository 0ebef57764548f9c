"""Sets of `datasets`: Parquet, Arrow and saved folders, prepared or read where they lie."""

from __future__ import annotations

import io
import pickle
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from dino_lite.contracts import Splits
from dino_lite.data import order
from dino_lite.data.auto import open_auto
from dino_lite.data.clean import CleanImages
from dino_lite.data.huggingface import open_huggingface
from dino_lite.data.pack import write_shards
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sampler import PositionSampler
from dino_lite.data.shards import open_shards
from images import classes, sentence

datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")

NUM_TRAIN, NUM_TEST = 23, 6
FEATURES = datasets.Features(
    {
        "id": datasets.Value("int64"),
        "image": datasets.Image(),
        "animal": datasets.ClassLabel(names=["cat", "dog"]),
    }
)


def encoded(color: int, kind: str = "PNG") -> bytes:
    """A small image as a file."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (color, 255 - color, 0)).save(file, kind)
    return file.getvalue()


def rows(start: int, stop: int) -> dict[str, Any]:
    """Some rows of the set, every image of another color."""
    return {
        "id": list(range(start, stop)),
        "image": [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(start, stop)],
        "animal": [i % 2 for i in range(start, stop)],
    }


def dataset(start: int, stop: int) -> Any:
    """The same, as `datasets` has it."""
    return datasets.Dataset.from_dict(rows(start, stop), features=FEATURES)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """An empty cache, no progress bars, and a list of all that was asked of any network."""
    asked: list[Any] = []

    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX:  # torch's workers
            return connect(self, address)
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield asked
    datasets.enable_progress_bars()


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Two files of train with row groups of 4, and one of validation, named as on the Hub."""
    folder = tmp_path / "pets"
    (folder / "data").mkdir(parents=True)
    parts = {
        "train-00000-of-00002": (0, 14),
        "train-00001-of-00002": (14, NUM_TRAIN),
        "validation-00000-of-00001": (100, 100 + NUM_TEST),
    }
    for name, (start, stop) in parts.items():
        dataset(start, stop).to_parquet(folder / "data" / f"{name}.parquet", batch_size=4)
    return folder


def check(splits: Splits) -> None:
    """Images, labels and splits are those that were written, in order."""
    assert splits.test is not None
    assert (len(splits.train), len(splits.test)) == (NUM_TRAIN, NUM_TEST)
    for source, first in ((splits.train, 0), (splits.test, 100)):
        assert source.classes == ["cat", "dog"]
        assert classes(source) == [["cat", "dog"][i % 2] for i in range(len(source))]
        assert [source.read(i)[0, 0, 0] for i in range(len(source))] == list(
            range(first, first + len(source))
        )
        assert source.encoded(0) == (encoded(first), ".png")  # type: ignore[attr-defined]
        assert source.image_size(0) == (4, 6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(parquet: Path, hub: list[Any], streaming: bool) -> None:
    """Several files and row groups, prepared or read where they lie; no network is asked."""
    splits = open_huggingface(parquet, streaming=streaming)
    assert splits.name == "pets"
    check(splits)
    check(splits._replace(train=pickle.loads(pickle.dumps(splits.train))))
    assert hub == []
    assert (parquet.parent / "cache").exists() != streaming


def test_both_ways_are_the_same_list(parquet: Path) -> None:
    """Digests agree, and follow labels, order and number."""
    prepared, streamed = (open_huggingface(parquet, streaming=s).train for s in (False, True))
    assert prepared.digest() == streamed.digest()
    assert [streamed.name(i) for i in (0, 9)] == ["pets/train[0]", "pets/train[9]"]
    dataset(1, 15).to_parquet(parquet / "data" / "train-00000-of-00002.parquet", batch_size=4)
    assert open_huggingface(parquet, streaming=True).train.digest() != streamed.digest()


def test_saved_sets(tmp_path: Path) -> None:
    """What save_to_disk writes of a set, of its splits, and of one that was shuffled."""
    both = datasets.DatasetDict(train=dataset(0, NUM_TRAIN), test=dataset(100, 100 + NUM_TEST))
    both.save_to_disk(tmp_path / "both")
    check(open_huggingface(tmp_path / "both"))
    check(open_auto(tmp_path / "both"))
    dataset(0, 9).select([5, 3, 8]).save_to_disk(tmp_path / "some")
    some = open_huggingface(tmp_path / "some")
    assert some.test is None
    assert [some.train.read(i)[0, 0, 0] for i in range(3)] == [5, 3, 8]
    assert some.train.labels is not None
    assert some.train.labels.tolist() == [1, 1, 0]
    told = sentence(open_huggingface, tmp_path / "both", streaming=True)
    assert "data.streaming=false" in told


def test_arrow_files(tmp_path: Path) -> None:
    """As `datasets` leaves them in its cache; not in Parquet, so not for streaming."""
    folder = tmp_path / "pets"
    folder.mkdir()
    for name, start, stop in (("train", 0, NUM_TRAIN), ("test", 100, 100 + NUM_TEST)):
        with datasets.arrow_writer.ArrowWriter(
            path=str(folder / f"{name}.arrow"), features=FEATURES
        ) as writer:
            writer.write_table(dataset(start, stop).data.table)
            writer.finalize()
    check(open_huggingface(folder))
    check(open_auto(folder))
    assert len(open_auto(folder / "train.arrow").train) == NUM_TRAIN
    assert "not in Parquet" in sentence(open_huggingface, folder, streaming=True)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_workers_read_what_one_process_reads(
    parquet: Path, streaming: bool, num_workers: int
) -> None:
    """Each forked worker reads its own batches."""
    source = open_huggingface(parquet, streaming=streaming).train
    source.read(5)  # the parent has files open before it forks
    loader = DataLoader(
        CleanImages(source, Preprocessing((8, 8))),
        batch_size=3,
        num_workers=num_workers,
        collate_fn=lambda x: x,
    )
    shown = np.concatenate([batch.images[:, 0, 0, 0].numpy() for batch in loader])
    assert shown.tolist() == list(range(NUM_TRAIN))


def test_streaming_resumes_in_the_middle_of_an_epoch(
    parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4 to 9 of a resumed run show the images of one that was not stopped; all once."""
    monkeypatch.setattr(order, "WINDOW", 8)
    source = open_huggingface(parquet, streaming=True).train
    assert source.groups.tolist() == [0, 4, 8, 12, 14, 18, 22, 23]  # type: ignore[attr-defined]

    def shown(start: int) -> list[int]:
        groups = source.groups  # type: ignore[attr-defined]
        sampler = PositionSampler(NUM_TRAIN, 5, start_step=start, num_steps=10, groups=groups)
        return [int(source.read(index)[0, 0, 0]) for part in sampler for _, index in part]

    whole = shown(0)
    assert shown(4) == whole[20:]
    assert sorted(whole[:NUM_TRAIN]) == list(range(NUM_TRAIN))


def test_few_row_groups_are_read_and_kept(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the sampler's order each row group is read about once an epoch; a window's stay."""
    monkeypatch.setattr(order, "WINDOW", 8)
    source: Any = open_huggingface(parquet, streaming=True).train
    read: list[int] = []
    plain = source.table._read
    monkeypatch.setattr(source.table, "_read", lambda c, g: read.append(g) or plain(c, g))
    for index in order.grouped_permutation(0, 0, source.groups):
        source.read(int(index))
        assert len(source.table._kept) <= 4
    assert sorted(read) == list(range(7))


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    """Bytes without a type, text as labels, none for some; what is named must be there."""
    plain = datasets.Dataset.from_dict(
        {
            "first": [encoded(i, "JPEG") for i in range(6)],
            "second": [encoded(9)] * 6,
            "label": ["b", "a", None, "b", "a", "b"],
            "kind": [3, 3, 7, 7, 7, -1],
        },
        features=datasets.Features(
            {
                "first": datasets.Value("binary"),
                "second": datasets.Image(),
                "label": datasets.Value("string"),
                "kind": datasets.Value("int32"),
            }
        ),
    )
    file = tmp_path / "plain.parquet"
    plain.to_parquet(file)
    source: Any = open_huggingface(file, image="first", streaming=True).train
    assert source.encoded(3) == (encoded(3, "JPEG"), ".jpg")
    assert (source.classes, source.labels.tolist()) == (["a", "b"], [1, 0, -1, 1, 0, 1])
    other: Any = open_huggingface(file, image="second", label="kind").train
    assert other.encoded(0)[0] == encoded(9)
    assert (other.classes, other.labels.tolist()) == (["3", "7"], [0, 0, 1, 1, 1, -1])
    assert open_huggingface(file, label="none", streaming=True).train.labels is None
    assert "data.image=kind" in sentence(open_huggingface, file, image="kind")
    assert "data.label=no" in sentence(open_huggingface, file, label="no", streaming=True)


def test_images_by_path_and_missing_ones(tmp_path: Path) -> None:
    """A row may name a file; one that is empty is an error of that image."""
    (tmp_path / "a.png").write_bytes(encoded(7))
    cells = [{"bytes": None, "path": str(tmp_path / "a.png")}, None]
    table = datasets.Dataset.from_dict(
        {"image": cells}, features=datasets.Features({"image": datasets.Image()})
    )
    table.save_to_disk(tmp_path / "saved")
    source = open_huggingface(tmp_path / "saved").train
    assert source.read(0)[0, 0, 0] == 7
    with pytest.raises((OSError, ValueError), match="no image"):
        source.read(1)


def test_a_set_of_the_hub_is_not_asked_for(hub: list[Any], tmp_path: Path) -> None:
    """Without download no connection is tried; what is missing is one sentence."""
    told = sentence(open_huggingface, "nobody/nothing")
    assert "data.download=true" in told
    assert "data.download=true" in sentence(open_huggingface, "nobody/nothing", streaming=True)
    assert "neither a file or folder" in sentence(open_huggingface, tmp_path / "gone" / "a.parquet")
    assert hub == []


def test_a_cached_set_of_the_hub_opens_without_network(
    hub: list[Any], parquet: Path, tmp_path: Path
) -> None:
    """What was fetched earlier is there, by its name; several configurations must be told apart."""
    files = {
        split: [str(file) for file in sorted((parquet / "data").glob(f"{split}-*"))]
        for split in ("train", "validation")
    }
    for config in ("default", "small"):
        builder = datasets.load_dataset_builder("parquet", config, data_files=files)
        builder.download_and_prepare()
        cached = tmp_path / "cache" / "someone___pets" / config / "0.0.0"
        cached.mkdir(parents=True)
        for file in Path(builder.cache_dir).rglob("*"):
            file.rename(cached / file.name) if file.is_dir() else None
        target = cached / "abc"
        target.mkdir()
        for file in Path(builder.cache_dir).iterdir():
            content = file.read_bytes().replace(b'"parquet"', b'"pets"')
            (target / file.name.replace("parquet-", "pets-")).write_bytes(content)
        if config == "default":
            check(open_huggingface("someone/pets"))
    assert "data.config" in sentence(open_huggingface, "someone/pets")
    check(open_huggingface("someone/pets", config="small"))
    assert hub == []


def test_splits_are_chosen(parquet: Path) -> None:
    """By name; one that is not there is named with those that are."""
    for streaming in (False, True):
        turned = open_huggingface(parquet, train="validation", test="train", streaming=streaming)
        assert (len(turned.train), len(turned.test or [])) == (NUM_TEST, NUM_TRAIN)
    told = sentence(open_huggingface, parquet, train="unlabeled")
    assert "data.train=unlabeled" in told


def test_splits_of_parquet_files_by_their_names(tmp_path: Path, parquet: Path) -> None:
    """In any words; what is in neither split is counted by rows."""
    source = sorted(parquet.rglob("*.parquet"))[-1]
    rows = len(open_huggingface(source).train)
    root = tmp_path / "set" / "deep" / "down"
    root.mkdir(parents=True)
    for name in ("cats-training-0", "cats-eval-0", "cats-test-0", "unsupervised"):
        shutil.copy(source, root / f"{name}.parquet")
    for streaming in (False, True):
        splits = open_huggingface(tmp_path / "set", streaming=streaming)
        assert (len(splits.train), len(splits.test or [])) == (rows, rows)
        counted = [int(sentence.split()[0]) for sentence in splits.left_out]
        assert counted == [rows, rows]
        other = open_huggingface(tmp_path / "set", test="cats-test", streaming=streaming)
        assert len(other.test or []) == rows
    assert len(open_auto(tmp_path / "set").train) == rows


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    """One sentence each."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    for streaming in (False, True):
        told = sentence(open_huggingface, tmp_path / "a.parquet", streaming=streaming)
        assert "cannot be opened" in told
    datasets.Dataset.from_dict({"path": ["x.png"]}).to_parquet(tmp_path / "b.parquet")
    assert "data=files" in sentence(open_huggingface, tmp_path / "b.parquet", streaming=True)
    (tmp_path / "empty").mkdir()
    assert "holds no .parquet" in sentence(open_huggingface, tmp_path / "empty")


def test_auto_knows_parquet_with_images(parquet: Path, tmp_path: Path) -> None:
    """By the schema: a list of paths is something else."""
    check(open_auto(parquet))
    check(open_auto(parquet / "data"))
    assert open_auto(parquet, labels="none").train.labels is None
    lists = tmp_path / "lists"
    lists.mkdir()
    datasets.Dataset.from_dict({"path": ["x.png"]}).to_parquet(lists / "b.parquet")
    assert "holds no image file" in sentence(open_auto, lists)
    assert open_auto(lists / "b.parquet").train.name(0) == str(lists / "x.png")


def test_rows_are_packed_as_they_are(parquet: Path, tmp_path: Path) -> None:
    """Bytes of the files in the table become members of shards."""
    splits = open_huggingface(parquet, streaming=True)
    write_shards(splits, tmp_path / "packed")
    packed: Any = open_shards(tmp_path / "packed").train
    key = int(Path(packed.name(0)).stem)
    assert packed.encoded(0) == (encoded(key), ".png")
    assert packed.classes == ["cat", "dog"]


# ------------------------------------------------------------------- odd columns (pixels.json)


def table(path: Path, **columns: Any) -> Path:
    """A Parquet file written by pyarrow alone."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_as_lists(tmp_path: Path, streaming: bool) -> None:
    """Are no labels, and the sentence names the evaluation that takes several."""
    images = [{"bytes": encoded(i), "path": None} for i in range(4)]
    path = table(tmp_path / "a.parquet", image=images, labels=[[0, 1], [1], [], [2]])
    splits = open_huggingface(path, streaming=streaming)
    assert splits.train.labels is None
    assert "eval.multilabel" in splits.labels_from
    assert splits.train.read(3).shape[2] == 3


@pytest.mark.parametrize("other", ["md5", "embedding", "mask"])
@pytest.mark.parametrize("struct", [False, True])
def test_bytes_before_image(tmp_path: Path, other: str, struct: bool) -> None:
    """A column called image wins, and so does one of image structs."""
    images: list[Any] = [encoded(i) for i in range(4)]
    named = "image"
    if struct:
        images, named = [{"bytes": content, "path": None} for content in images], "scan"
    path = table(tmp_path / "a.parquet", **{other: [b"abc"] * 4, named: images})
    source: Any = open_auto(path).train
    assert source.image == named
    assert source.read(0).shape[2] == 3


def test_images_as_lists_are_refused_with_the_cure(tmp_path: Path) -> None:
    """Several images a row."""
    image = {"bytes": encoded(0), "path": None}
    path = table(tmp_path / "a.parquet", images=[[image, image], [image]])
    assert "several images a row in its column images" in sentence(open_auto, path)
