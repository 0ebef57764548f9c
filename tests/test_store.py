"""Features are extracted once, kept under a key of all they depend on, and shared by ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.folder import open_folder
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import ArraySource
from dino_lite.data.subset import Subset
from dino_lite.distributed import alone
from dino_lite.eval import store as store_file
from dino_lite.eval.baselines import raw_pixels
from dino_lite.eval.features import Pooled
from dino_lite.eval.store import FeatureStore, content_key, demand_labels
from ranks import on_ranks
from test_features import half_broken, images, vit
from tiny import photos


def data_of(train: Any, test: Any = None, **changes: Any) -> CleanData:
    return CleanData(Splits(train, test, "set"), Preprocessing((16, 16))._replace(**changes), 4)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each extraction was asked for."""
    asked: list[int] = []
    real = store_file.extract_pooled

    def counted(*args: Any, **kwargs: Any) -> Pooled:
        asked.append(len(args[2]))
        return real(*args, **kwargs)

    monkeypatch.setattr(store_file, "extract_pooled", counted)
    return asked


def test_pooled_features_are_those_of_the_last_blocks() -> None:
    """Oldest first, each through the last norm; the mean patch is the last block's."""
    backbone, source = vit().eval(), images(6)
    data = data_of(source)
    found = FeatureStore(data).pooled(backbone, source, num_blocks=2)
    pixels = data.normalize(source.images.permute(0, 3, 1, 2))
    with torch.no_grad():
        tokens = backbone.intermediate(pixels, [0, 1])
        last = backbone(pixels)
    torch.testing.assert_close(found.cls[:, 0], tokens[0].cls)
    torch.testing.assert_close(found.cls[:, 1], last.cls)
    torch.testing.assert_close(found.patches, last.patches.mean(dim=1))
    both = found.features(2, patches=True).features
    torch.testing.assert_close(both, torch.cat([*found.cls.unbind(1), found.patches], dim=1))
    assert found.index.tolist() == list(range(6))


def test_blocks_that_are_not_there_are_not_asked_for() -> None:
    """A network of two blocks has features of two."""
    source = images(3)
    assert FeatureStore(data_of(source), num_blocks=4).pooled(vit(), source).cls.shape[1] == 2


def test_each_split_is_extracted_once(tmp_path: Path, count: list[int]) -> None:
    """However often it is asked for, in this process and, with a folder, in the next; fewer blocks
    than are kept cost nothing either."""
    train, test, backbone = images(6), images(3), vit()
    store = FeatureStore(data_of(train, test), tmp_path, num_blocks=2)
    first = store.labeled(backbone, "this")
    assert store.labeled(backbone, "this")[0] is first[0]
    again = FeatureStore(data_of(train, test), tmp_path, num_blocks=2).labeled(backbone, "this")
    assert count == [6, 3]
    for part, kept in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, kept, strict=True))


def test_unreadable_images_are_remembered(tmp_path: Path, count: list[int]) -> None:
    """What was left out is told again where features come from the disk."""
    source = images(7, half_broken)
    for _ in range(2):
        data = data_of(source)
        found = FeatureStore(data, tmp_path).pooled(vit_of(0), source)
        assert found.index.tolist() == [1, 2, 4, 5]
        assert found.labels.tolist() == [1, 2, 4, 5]
        assert len(data.bad) == 3
    assert count == [7]


def vit_of(seed: int, **kwargs: Any) -> ViT:
    torch.manual_seed(seed)
    return vit(**kwargs)


def test_the_key_knows_all_that_features_depend_on(tmp_path: Path) -> None:
    """Weights, images, labels, preprocessing, number of blocks; the same gives the same."""
    source, backbone = images(4), vit_of(0)

    def key(backbone: Any = backbone, source: Any = source, **changes: Any) -> str:
        return content_key(backbone, data_of(source, **changes), source)

    assert key() == key(vit_of(0))
    moved = vit_of(0)
    with torch.no_grad():
        moved.norm.bias[3] += 1e-6
    others = ArraySource(source.images, np.array([0, 0, 1, 1]), source.classes, source.title)
    keys = [
        key(),
        key(moved),
        key(vit_of(0).double()),
        key(vit_of(0, position_offset=0.1)),
        key(source=images(4)),
        key(source=others),
        key(size=(24, 24)),
        key(size=(24, 16)),
        key(mean=(0.5,) * 3),
        key(std=(0.5,) * 3),
        key(crop=0.9),
        key(squash=True),
        key(interpolation="bilinear"),
        key(border=True),
        key(rule="timm"),
        key(raw_pixels(data_of(source))),
    ]
    assert len(set(keys)) == len(keys)


def test_a_file_that_was_changed_is_seen(tmp_path: Path) -> None:
    """Paths alone would not tell."""
    folder = photos(tmp_path / "photos", ["a/1.png", "a/2.png", "b/1.png", "b/2.png"])
    source = open_folder(str(folder)).train

    def key() -> str:
        return content_key(vit_of(0), data_of(source), source)

    before, part = key(), Subset(source, np.array([0, 2]))
    assert key() == before
    before_part = content_key(vit_of(0), data_of(part), part)
    Image.new("RGB", (41, 30)).save(folder / "a" / "1.png")
    assert key() != before
    assert content_key(vit_of(0), data_of(part), part) != before_part


def test_half_a_file_is_extracted_anew(tmp_path: Path, count: list[int]) -> None:
    """A process that died while it wrote, or a stranger's file."""
    source, backbone = images(4), vit_of(0)
    FeatureStore(data_of(source), tmp_path).pooled(backbone, source)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    FeatureStore(data_of(source), tmp_path).pooled(backbone, source)
    assert count == [4, 4]


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    """Results do not depend on the cache."""
    (tmp_path / "file").write_text("")
    source = images(4)
    found = FeatureStore(data_of(source), tmp_path / "file" / "x").pooled(vit_of(0), source)
    assert len(found.labels) == 4


def test_labels_are_asked_for_in_words() -> None:
    """Which evaluation needs them, and what to do; a test split without any is no test split."""
    unlabeled = images(4)
    unlabeled.labels = None
    reasons = {"data.labels=none": "data.labels=none", "": "the data has none"}
    for why, told in reasons.items():
        with pytest.raises(UserError, match=re.escape(f"({told}); give them by folders, one per")):
            demand_labels(Splits(unlabeled, None, "few", labels_from=why), "k-NN")
    with pytest.raises(UserError, match=r"k-NN needs labels.*data\.labels"):
        FeatureStore(data_of(unlabeled)).labeled(vit(), "k-NN")
    assert FeatureStore(data_of(images(4), unlabeled)).labeled(vit(), "k-NN")[1] is None


def test_nothing_readable_is_a_sentence() -> None:
    """Where to look."""
    with pytest.raises(UserError, match="no image it could read"):
        FeatureStore(data_of(images(1, half_broken))).pooled(vit(), images(1, half_broken))


def _rank(rank: int, kind: str) -> Any:
    torch.manual_seed(0)
    broken = kind == "broken"
    source = images(1 if kind == "one" else 7, half_broken if broken else ArraySource)
    data = data_of(source)
    found = FeatureStore(data).pooled(vit_of(0), source, num_blocks=2)
    return tuple(found), sorted(data.bad)


@pytest.mark.parametrize("kind", ["whole", "broken", "one"])
def test_ranks_share_the_work_and_all_get_all(kind: str) -> None:
    """Two and one process have the same rows in the same order; none is counted twice, also where
    a rank has none."""
    torch.manual_seed(0)
    source = images(1 if kind == "one" else 7, half_broken if kind == "broken" else ArraySource)
    if kind == "one":
        source.labels = np.array([0])
    data = data_of(source)
    alone = FeatureStore(data).pooled(vit_of(0), source, num_blocks=2)
    for found, bad in on_ranks(2, _rank, kind):
        assert bad == sorted(data.bad)
        for part, wanted in zip(found, alone, strict=True):
            torch.testing.assert_close(part, wanted)


def _first_alone(rank: int) -> list[int]:
    """Rank 0 extracts by itself, what nobody else is asked for."""
    if rank > 0:
        return []
    torch.manual_seed(0)
    source = images(7)
    with alone():
        return FeatureStore(data_of(source)).pooled(vit_of(0), source).index.tolist()


def test_a_rank_that_is_alone_waits_for_nobody() -> None:
    """It extracts every image, as rank 0 does when a run of several has ended."""
    assert on_ranks(2, _first_alone) == [list(range(7)), []]


def test_fewer_blocks_than_are_kept_cost_nothing(tmp_path: Path, count: list[int]) -> None:
    """In the next process too; more are extracted once, and take the smaller file's place."""
    source, backbone = images(4), vit_of(0)
    for num_blocks in (1, 2, 1, 2):
        FeatureStore(data_of(source), tmp_path).pooled(backbone, source, num_blocks)
    assert count == [4, 4]
    assert len(list(tmp_path.iterdir())) == 1
