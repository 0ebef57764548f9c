"""The data of a stage: what is held out, what is replayed when, and what no stage takes."""

from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data.crops import MultiCrop
from dino_lite.data.datamodule import DataModule
from dino_lite.data.mixture import Mixture, images_in_memory
from dino_lite.data.order import grouped_permutation
from dino_lite.data.photometric import Normalize
from dino_lite.data.sampler import PositionSampler
from dino_lite.data.sources import ArraySource
from dino_lite.data.stage_data import (
    check_collections,
    halves,
    identity,
    open_stage_data,
    same_images,
)
from dino_lite.data.subset import Subset
from dino_lite.planning.checks import check_values
from dino_lite.planning.plan import gather_facts, open_splits, plan
from dino_lite.runs.trust import demand_trust, targets
from tiny import photos, tiny


class Numbered(Source):
    """Images of one pixel that say their set and number."""

    def __init__(self, title: int, num: int, labeled: bool = False) -> None:
        self.title, self.num, self.announced = title, num, list[int]()
        self.labels = np.arange(num) % 3 if labeled else None
        self.classes = ("a", "b", "c") if labeled else ()

    def __len__(self) -> int:
        return self.num

    def read(self, index: int, min_pixels: int | None = None) -> np.ndarray:
        if not 0 <= index < self.num:
            raise IndexError(index)
        return np.array([[[self.title, index // 256, index % 256]]], np.uint8)

    def name(self, index: int) -> str:
        return f"{self.title}/{index}"

    def digest(self) -> str:
        return f"{self.title}{self.num}"

    def prefetch(self, indices: Any) -> None:
        self.announced += indices


def splits(title: int, num: int, labeled: bool = False) -> Splits:
    return Splits(Numbered(title, num, labeled), None, f"set {title}")


def epochs(source: Source, num: int, batch_size: int = 4) -> list[list[str]]:
    """The names of the images of each epoch, in the sampler's order."""
    sampler = PositionSampler(
        len(source), batch_size, seed=3, groups=source.groups, turns=source.turns
    )
    pairs = (pair for part in sampler for pair in part)
    return [[source.name(i) for _, i in islice(pairs, len(source))] for _ in range(num)]


# ------------------------------------------------------------------------------------- held out


def test_a_tenth_of_each_class_is_left_to_judge_by() -> None:
    """Unlabeled images are trained on; the rest and the test split stay as they are."""
    data = splits(1, 100, labeled=True)
    assert data.train.labels is not None
    data.train.labels[90:] = -1
    whole = data._replace(test=data.train)
    stage = open_stage_data(whole, seed=5)
    parts = halves(data.train, 5)
    assert parts is not None
    assert len(parts.held) == 9
    assert len(parts.bank) == 81
    assert np.bincount(data.train.labels[parts.held]).tolist() == [3, 3, 3]
    names = {stage.train.name(i) for i in range(len(stage.train))}
    held = {data.train.name(int(i)) for i in parts.held}
    assert names == {f"1/{i}" for i in range(100)} - held
    assert stage.test is data.train
    assert stage.left_out == (
        "9 of 100 images are held out, a tenth of each class, to measure what is gained.",
    )
    assert len(open_stage_data(whole, hold_out=False).train) == 100
    other = halves(data.train, 6)
    assert other is not None
    assert not np.array_equal(other.held, parts.held)


@pytest.mark.parametrize("labels", [None, [0] * 8, [0, 1, 2, 3, 4, 5, 6, 7], [-1] * 8])
def test_nothing_is_held_out_where_nothing_can_be_judged(labels: list[int] | None) -> None:
    """No labels, one class, no class with two images."""
    data = splits(1, 8)
    data.train.labels = None if labels is None else np.array(labels)
    assert halves(data.train, 0) is None
    assert open_stage_data(data) == data


# --------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize(
    ("sizes", "share", "num"),
    [([50], 0.2, 5), ([7], 0.5, 20), ([3, 90], 0.25, 7), ([5, 9], 0.05, 1)],
)
def test_every_epoch_is_the_collection_once_and_a_share_of_others(
    sizes: list[int], share: float, num: int
) -> None:
    """Others in each epoch; over the epochs all come, as often as each other, of each collection
    as many.
    """
    keep = {f"keep{i}": splits(i + 2, size) for i, size in enumerate(sizes)}
    source = open_stage_data(splits(1, 20), keep, share, seed=1).train
    assert isinstance(source, Mixture)
    assert len(source) == 20 + num
    assert num == pytest.approx(share * len(source), abs=1)
    seen: list[str] = []
    for names in epochs(source, 30):
        own = [name for name in names if name.startswith("1/")]
        assert sorted(own) == sorted(f"1/{i}" for i in range(20))
        seen += [name for name in names if not name.startswith("1/")]
    assert len(seen) == 30 * num
    for i, size in enumerate(sizes):
        times = [seen.count(f"{i + 2}/{j}") for j in range(size)]
        assert max(times) - min(times) <= 1
        assert sum(times) == pytest.approx(30 * num / len(sizes), abs=1)


def test_an_epoch_never_has_two_crops_of_the_same_key() -> None:
    """Crops are keyed by epoch and number: a small collection repeated in an epoch has several
    numbers for an image.
    """
    source = Mixture(Numbered(1, 6), [Numbered(2, 2)], 7)
    for epoch in range(9):
        found = source.turns(np.arange(13), epoch)
        assert len(set(found.tolist())) == 13
        assert {source.name(i) for i in found.tolist()} >= {"2/0", "2/1"}


def test_replay_is_the_same_for_ranks_and_after_a_resume() -> None:
    """It is a function of the position alone."""
    source = Mixture(Numbered(1, 10), [Numbered(2, 9), Numbered(3, 4)], 4)
    names = [name for epoch in epochs(source, 4) for name in epoch]
    for start, rank in ((3, 0), (5, 1)):
        sampler = PositionSampler(14, 4, rank, 2, 3, start, 12, turns=source.turns)
        found = [source.name(i) for part in sampler for _, i in part]
        wanted = [names[4 * step + 2 * rank + i] for step in range(start, 12) for i in (0, 1)]
        assert found == wanted


def test_images_held_out_of_a_kept_collection_are_not_replayed() -> None:
    """Else what is lost would be measured on images that were trained on."""
    old = splits(2, 60, labeled=True)
    source = open_stage_data(splits(1, 20), {"keep": old}, 0.5, seed=4).train
    parts = halves(old.train, 4)
    assert parts is not None
    seen = {name for names in epochs(source, 6) for name in names if name.startswith("2/")}
    assert seen == {f"2/{i}" for i in range(60)} - {f"2/{i}" for i in parts.held}


def test_replayed_images_have_no_labels() -> None:
    """Classes are the collection's own; numbers of later epochs are unlabeled in crops as well."""
    mine = splits(1, 20, labeled=True)
    old = splits(2, 60, labeled=True)
    stage = open_stage_data(mine, {"keep": old}, 0.3)
    source = stage.train
    assert source.labels is not None
    assert len(source.labels) == len(source) == 17 + 7
    assert source.labels[17:].tolist() == [-1] * 7
    assert (source.labels[:17] >= 0).all()
    assert source.classes == ("a", "b", "c")
    data = DataModule(stage, MultiCrop(8, 4, 0), Normalize(), batch_size=8, num_steps=9)
    batches = [data.on_after_batch_transfer(parts, 0) for parts in data.train_dataloader()]
    index, labels = (torch.cat([getattr(b, f) for b in batches]) for f in ("index", "labels"))
    assert bool((labels[index >= 17] == -1).all())
    assert bool((labels[index < 17] >= 0).all())
    assert int(index.max()) >= len(source)


def test_groups_are_read_one_after_the_other() -> None:
    """Replayed images come in the order in which a collection of shards is best read, and take
    their places among the windows of a collection of shards.
    """
    own, old = Numbered(1, 40_000), Numbered(2, 30_000)
    own.groups, old.groups = (np.arange(0, len(s) + 1, 1000) for s in (own, old))
    source = Mixture(own, [old], 10_000, seed=7)
    assert source.groups is not None
    assert source.groups[-1] == len(source)
    assert (np.diff(source.groups) > 0).all()
    order = grouped_permutation(0, 0, source.groups)
    names = [source.name(i) for i in source.turns(order, 1).tolist()]
    numbers = [int(name[2:]) for name in names if name.startswith("2/")]
    assert numbers == grouped_permutation(7, 0, old.groups)[10_000:20_000].tolist()
    places = np.flatnonzero([name.startswith("2/") for name in names])
    assert len(np.unique(places // 5000)) >= 3  # not in one place


# ---------------------------------------------------------------------------------- as a source


def test_a_mixture_asks_the_right_collection() -> None:
    """Names, sizes, prefetching, files; a pickle of it reads the same."""
    own, old = Numbered(1, 4), Numbered(2, 5)
    source = Mixture(own, [old], 2, seed=2)
    order = source.orders[0].tolist()
    assert [source.name(i) for i in range(9)] == [
        *(f"1/{i}" for i in range(4)),
        *(f"2/{i}" for i in order),
    ]
    assert source.image_size(8) == (1, 1)
    assert source.read(6).tolist() == old.read(order[2]).tolist()
    source.prefetch([3, 5, 0])
    assert (own.announced, old.announced) == ([3, 0], [order[1]])
    copied = pickle.loads(pickle.dumps(source))
    assert [copied.name(i) for i in range(9)] == [source.name(i) for i in range(9)]


def test_a_digest_tells_mixtures_apart() -> None:
    """By their collections, the number replayed and the seed."""
    parts: list[Any] = [
        (Numbered(1, 4), [Numbered(2, 5)], 2, 0),
        (Numbered(1, 5), [Numbered(2, 5)], 2, 0),
        (Numbered(1, 4), [Numbered(3, 5)], 2, 0),
        (Numbered(1, 4), [Numbered(2, 5)], 3, 0),
        (Numbered(1, 4), [Numbered(2, 5)], 2, 1),
    ]
    digests = [Mixture(*part).digest() for part in parts]
    assert len(set(digests)) == len(parts)
    assert digests[0] == Mixture(*parts[0]).digest()


def in_memory(title: int, num: int, size: int = 8) -> ArraySource:
    pixels = np.random.default_rng(title).integers(0, 256, (num, size, size, 3), dtype=np.uint8)
    return ArraySource(torch.from_numpy(pixels), np.arange(num) % 2, ["a", "b"], f"set {title}")


def test_small_images_of_all_collections_are_cropped_on_the_device() -> None:
    """As those of one: by number, those that the source reads."""
    old = Subset(in_memory(2, 9), np.array([8, 1, 3]))
    source = Mixture(in_memory(1, 6), [old, in_memory(3, 5)], 9)
    whole = images_in_memory(source, 64)
    assert whole is not None
    for index in range(len(whole)):
        assert np.array_equal(whole[index].numpy(), source.read(index))
    assert int(source.turns(np.arange(15), 7).max()) < len(whole)
    assert images_in_memory(source, 4) is None
    assert images_in_memory(Mixture(in_memory(1, 6), [in_memory(2, 5, 6)], 3), 64) is None
    assert images_in_memory(Mixture(in_memory(1, 6), [Numbered(2, 5)], 3), 64) is None
    data = DataModule(
        Splits(source, None, "both"),
        MultiCrop(4, 4, 0, where="device"),
        Normalize(),
        15,
        num_steps=2,
    )
    batches = [data.on_after_batch_transfer(parts, 0) for parts in data.train_dataloader()]
    assert batches[1].globals_.shape == (2, 15, 3, 4, 4)
    assert data._whole is not None


# --------------------------------------------------------------------------------- what is refused


def test_the_same_images_by_another_path_are_found(tmp_path: Path) -> None:
    """A copy of the folder, and a list of its files; not other images of the same names."""
    names = [f"{kind}/{i}.png" for kind in "ab" for i in range(3)]
    first = photos(tmp_path / "first", names)
    photos(tmp_path / "copy", names)
    photos(tmp_path / "other", names, (30, 40))
    (tmp_path / "list.txt").write_text("".join(f"{first / name}\n" for name in names))
    node: dict[str, Any] = {"_target_": "dino_lite.data.auto.open_auto"}
    opened = {
        name: open_splits(node | {"root": str(tmp_path / name)})
        for name in ("first", "copy", "other", "list.txt")
    }
    mine = opened.pop("first")
    assert opened["other"].train.digest() == mine.train.digest()
    check_collections(mine, {"keep.root": opened["other"]})
    for name in ("copy", "list.txt"):
        assert same_images(mine.train, opened[name].train)
        with pytest.raises(UserError, match=r"^keep.root and data.root hold the same images \("):
            check_collections(mine, {"keep.root": opened[name]})
    with pytest.raises(UserError, match=r"^stages\[1\] and stages\[0\] hold the same images"):
        check_collections(mine, {"stages[0]": opened["other"], "stages[1]": opened["other"]})
    assert identity(mine.train) == identity(opened["copy"].train)
    assert identity(mine.train) != identity(opened["other"].train)


def test_other_channels_are_refused() -> None:
    """Before anything is trained."""
    node = {"_target_": "dino_lite.data.shapes.open_shapes", "num_train": 20, "num_test": 0}
    color, gray = (open_splits(node | {"channels": channels}) for channels in (3, 1))
    told = r"^keep.root: the images of shapes have 1 channel, those of shapes 3: set channels"
    with pytest.raises(UserError, match=told):
        check_collections(color, {"keep.root": gray})
    with pytest.raises(UserError, match="have 1 channel"):
        open_stage_data(color, {"keep": gray}, 0.2)


def nested(share: Any = 0.25) -> dict[str, Any]:
    """Embedded shapes, with others of another seed to replay."""
    shapes = {"_target_": "dino_lite.data.shapes.open_shapes", "num_train": 40, "num_test": 10}
    auto = {"_target_": "dino_lite.data.auto.open_auto", "root": None, "labels": "auto"}
    return {
        "_target_": "dino_lite.data.stage_data.open_stage_data",
        "data": shapes,
        "keep": {"old": shapes | {"seed": 1}, "first": auto},
        "share": share,
    }


def test_a_configuration_with_nested_data_is_checked_planned_and_trusted(tmp_path: Path) -> None:
    """Wrong values are named by their key, labels may say auto, and targets are found inside."""
    config = check_values(tiny(tmp_path) | {"data": nested()})
    opened = open_splits(config["data"])
    assert len(opened.train) == 30 + 10
    planned = plan(config, gather_facts(config, opened)).config
    assert planned["data"] == config["data"]
    demand_trust(targets(config["data"]), (), "config.yaml")
    for node, told in (
        (nested(share=1), r"^data.share=1: it must be a number of at least 0 and below 1"),
        (nested() | {"data": {}}, "data.data"),
        (nested() | {"keeps": {}}, "^data.keeps: there is no such key; did you mean data.keep?"),
    ):
        with pytest.raises(UserError, match=told):
            check_values(tiny(tmp_path) | {"data": node})
    strange = nested() | {"keep": {"old": {"_target_": "os.system", "command": "true"}}}
    with pytest.raises(UserError, match=r"trust='\[os\]'"):
        demand_trust(targets(strange), (), "config.yaml")
