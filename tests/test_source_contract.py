"""A source from outside the package needs four methods, and a part of a source forwards all."""

from __future__ import annotations

import functools
import importlib
import pickle
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dino_lite import data as data_package
from dino_lite.commands import check, evaluate, pretrain
from dino_lite.contracts import Source, Splits
from dino_lite.data.auto import open_auto
from dino_lite.data.clean import CleanData
from dino_lite.data.facts import read_facts
from dino_lite.data.inspection import inspect
from dino_lite.data.pack import write_shards
from dino_lite.data.pixels import Pixels
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import ArraySource
from dino_lite.data.subset import Subset
from dino_lite.eval.store import content_key
from dino_lite.runs import timing
from dino_lite.runs.run import read_json
from test_features import vit
from tiny import TINY

MODULE = '''
import numpy as np

from dino_lite.contracts import Source, Splits


class Ramps(Source):
    """Slanted ramps of gray, 20 x 24 pixels or a little more."""

    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def read(self, index, min_pixels=None):
        rows, columns = np.mgrid[: 20 + index % 3, :24]
        gray = (5 * rows + (index % 5) * columns + 7 * index) % 256
        return np.stack([gray] * 3, axis=-1).astype(np.uint8)

    def name(self, index):
        return f"ramps/{index}"

    def digest(self):
        return f"{self.num:016x}"


def open_ramps(num, labeled=False):
    train, test = Ramps(num), Ramps(num // 2)
    if labeled:
        for source in (train, test):
            source.labels, source.classes = np.arange(len(source)) % 5, list("abcde")
    return Splits(train, test, "ramps")
'''
OWN = "test_source_contract_ramps"  # the module's name
CONFIG = f"_target_: {OWN}.open_ramps\nnum: 24\nlabeled: false\n"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, importable as with PYTHONPATH; its configuration is in tmp_path/conf."""
    (tmp_path / f"{OWN}.py").write_text(MODULE)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "ramps.yaml").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, OWN, raising=False)
    return importlib.import_module(OWN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "labeled", "evaluation"), [(0, False, "duplicates"), (2, True, "knn")]
)
def test_a_source_from_outside_works_with_every_command(
    outside: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    labeled: bool,
    evaluation: str,
) -> None:
    """Found by --config-dir and PYTHONPATH; trained on, measured, checked, packed, and trained on
    from there.
    """

    # Speeds are not looked at.
    quick = functools.partial(timing.time_loading, seconds=0)
    monkeypatch.setattr(check, "time_loading", quick)
    quick = functools.partial(timing.time_training, longest=0.0)
    monkeypatch.setattr(check, "time_training", quick)

    def run(main: Callable[[], None], *words: str) -> None:
        given = ["--config-dir", str(tmp_path / "conf"), *words, f"runs_dir={tmp_path / 'runs'}"]
        monkeypatch.setattr(sys, "argv", ["dino-lite", *given])
        main()

    keys = {key: value for key, value in TINY.items() if not key.startswith("data.")}
    keys |= {"loader.num_workers": num_workers, "trainer.max_steps": 2, "name": "own"}
    tiny = [f"{key}={value}" for key, value in keys.items()]
    own = ["data=ramps", f"data.labeled={labeled}"]
    run(pretrain.main, *own, *tiny)
    assert read_json(tmp_path / "runs" / "own" / "environment.json")["data"]["num_images"] == 24

    about = [f"eval=[{evaluation}]", "checkpoint=own", f"num_workers={num_workers}"]
    run(evaluate.main, *about, "accelerator=cpu", f"trust=[{OWN}]")
    found = read_json(tmp_path / "runs" / "own" / "results.json")["last"][evaluation]
    assert (found["data"], found["unreadable"]) == ("ramps", 0)

    packed = tmp_path / "packed"
    run(check.main, *own, *tiny, f"pack={packed}", f"out={tmp_path / 'out'}")
    report = read_json(tmp_path / "out" / "check.json")
    assert report["ok"]
    assert report["splits"]["train"]["num_readable"] == 24
    again = open_auto(packed)
    assert (len(again.train), len(again.test or [])) == (24, 12)
    assert (again.train.labels is not None) == labeled


def test_the_abstract_members_are_enough(outside: Any, tmp_path: Path) -> None:
    """Sizes are those of the pixels, digests are of them, and there is no file to look for."""
    splits = outside.open_ramps(24)
    facts = read_facts(splits)
    assert facts[:6] == (24, 12, 0, 21, 24, 3)
    found = inspect(splits.train, np.arange(24), hashing=False)
    assert sorted(set(found.rows["height"].tolist())) == [20, 21, 22]
    assert set(found.rows["format"].tolist()) == {b""}
    copy = pickle.loads(pickle.dumps(splits.train))
    assert np.array_equal(copy.read(3), splits.train.read(3))
    with pytest.raises(TypeError, match="digest"):
        type("Half", (Source,), {"__len__": len, "read": None, "name": None})()


CLUTTER = {
    "path": "somewhere",
    "paths": ["a", "b"],
    "file": 3,
    "files": ["a.bin", "b.bin"],
    "images": np.zeros(3),
    "size": (5, 5),
    "sizes": [1, 2],
    "raw": b"",
    "rows": 7,
    "table": {},
    "source": "camera 3",
    "shards": 0,
}


def test_attributes_of_its_own_break_nothing(outside: Any, tmp_path: Path) -> None:
    """Whatever they are called: facts, features' keys, inspection and packing are the same."""

    def outcome(splits: Splits, folder: Path) -> list[Any]:
        source = splits.train
        data = CleanData(splits, Preprocessing((16, 16)), batch_size=4)
        torch.manual_seed(0)
        write_shards(splits, folder)
        return [
            read_facts(splits),
            content_key(vit(), data, source),
            inspect(source, np.arange(24), hashing=False).rows.tobytes(),
            {path.name: path.read_bytes() for path in folder.iterdir()},
        ]

    cluttered = outside.open_ramps(24)
    for name, value in CLUTTER.items():
        setattr(cluttered.train, name, value)
    plain = outcome(outside.open_ramps(24), tmp_path / "plain")
    assert outcome(cluttered, tmp_path / "cluttered") == plain


class Told(Source):
    """Every member says which image it was asked about."""

    labels = np.arange(10, dtype=np.int64) * 2
    classes = tuple("abcdefghijklmnopqrst")
    channels = 5
    pixels = Pixels(5, background="white")
    groups = np.array([0, 3, 7, 10], dtype=np.int64)

    def __init__(self) -> None:
        self.announced: list[int] = []

    def __len__(self) -> int:
        return 10

    def read(self, index: int, min_pixels: int | None = None) -> np.ndarray:
        return np.full((1, 1, 5), index + (min_pixels or 0), np.uint8)

    def name(self, index: int) -> str:
        return f"image {index}"

    def digest(self) -> str:
        return "0123456789abcdef"

    def turns(self, order: np.ndarray, epoch: int) -> np.ndarray:
        return order + 10 * epoch

    def prefetch(self, indices: Any) -> None:
        self.announced.extend(indices)

    def image_size(self, index: int) -> tuple[int, int]:
        return index, 100 + index

    def encoded(self, index: int) -> tuple[bytes, str]:
        return bytes([index]), ".x"

    def data_files(self) -> list[str]:
        return ["one", "two"]


def announced(part: Subset) -> list[int]:
    part.prefetch([0, 2])
    return part.source.announced  # type: ignore[attr-defined]


def digests(part: Subset) -> tuple[bool, bool]:
    """Whether another part of the same images is equal, and one of another source."""
    other = Told()
    other.digest = lambda: "fedcba9876543210"  # type: ignore[method-assign]
    again, others = (Subset(source, part.rows) for source in (Told(), other))
    return part.digest() == again.digest(), part.digest() == others.digest()


# For each member of Source what the images 8, 1, 2, 3 of Told have.
FORWARDED: dict[str, tuple[Callable[[Subset], Any], Any]] = {
    "__len__": (len, 4),
    "labels": (lambda part: part.labels.tolist(), [16, 2, 4, 6]),  # type: ignore[union-attr]
    "classes": (lambda part: part.classes, Told.classes),
    "channels": (lambda part: part.channels, 5),
    "pixels": (lambda part: part.pixels, Pixels(5, background="white")),
    "groups": (lambda part: part.groups.tolist(), [0, 1, 3, 4]),  # type: ignore[union-attr]
    "read": (lambda part: [part.read(0, 50)[0, 0, 0], part.read(1)[0, 0, 0]], [58, 1]),
    "name": (lambda part: part.name(0), "image 8"),
    "digest": (digests, (True, False)),
    # Not forwarded: a part is the same images in every epoch.
    "turns": (lambda part: part.turns(np.arange(4), 3).tolist(), [0, 1, 2, 3]),
    "prefetch": (announced, [8, 2]),
    "image_size": (lambda part: part.image_size(0), (8, 108)),
    "encoded": (lambda part: part.encoded(0), (b"\x08", ".x")),
    "data_files": (lambda part: list(part.data_files()), ["one", "two"]),
}
MEMBERS = ["__len__", *(name for name in vars(Source) if not name.startswith("_"))]


@pytest.mark.parametrize("member", MEMBERS)
def test_a_subset_forwards(member: str) -> None:
    """Each member of a source, the new ones too: this fails until they have a line above."""
    ask, wanted = FORWARDED[member]
    assert ask(Subset(Told(), np.array([8, 1, 2, 3]))) == wanted


def test_a_subset_of_a_source_with_defaults_has_them_too() -> None:
    """No labels, no groups, no files."""
    pixels = torch.zeros(3, 2, 2, 1, dtype=torch.uint8)
    part = Subset(ArraySource(pixels, None, [], "x"), np.array([2, 0]))
    assert part.labels is part.groups is part.encoded(0) is None
    assert list(part.data_files()) == []


def test_parts_of_a_source_have_different_digests() -> None:
    """Other images, another order, a part of a part: features kept for one are not another's."""
    rows = [[0, 1], [1, 0], [0, 1, 2]]
    parts = [Told(), *(Subset(Told(), np.array(each)) for each in rows)]
    parts += [Subset(Subset(Told(), np.array(each)), np.array([1])) for each in rows[:2]]
    assert len({part.digest() for part in parts}) == len(parts)
    assert {len(part.digest()) for part in parts} == {16}


def test_sources_are_final() -> None:
    """None of ours derives from another: a behavior is looked up in one place."""
    for module in pkgutil.iter_modules(data_package.__path__, "dino_lite.data."):
        importlib.import_module(module.name)
    ours = [kind for kind in Source.__subclasses__() if kind.__module__.startswith("dino_lite.")]
    assert {ArraySource, Subset} < set(ours)
    assert all(getattr(kind, "__final__", False) for kind in ours)
    assert not any(kind.__subclasses__() for kind in ours)
