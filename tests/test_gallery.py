"""Pictures of what was learned show what they must, each alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lite.commands.evaluate import evaluate
from dino_lite.contracts import Backbone, Splits, Tokens, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.photometric import Normalize
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import ArraySource
from dino_lite.eval import pictures_map
from dino_lite.eval.baselines import RawPixels
from dino_lite.eval.features import Features
from dino_lite.eval.gallery import PICTURES, QUICK, draw_all
from dino_lite.eval.heat import palette
from dino_lite.eval.pictures_classes import confusion_picture, most_confused
from dino_lite.eval.pictures_map import map_picture, project
from dino_lite.eval.pictures_patches import (
    component_colors,
    components,
    foreground,
    painted,
    pca_picture,
    segmentation_picture,
)
from dino_lite.eval.segmentation import confusion
from dino_lite.eval.sheets import shortened, start_page
from dino_lite.eval.store import FeatureStore
from test_features import vit
from test_pictures import colors_of, first_broken, pixels_of, stripes
from tiny import pixel_features, train

PIXELS = RawPixels(Normalize(), 8)


def store(num_train: int = 24, num_test: int = 12, labeled: bool = True) -> FeatureStore:
    test = stripes(num_test, labeled) if num_test else None
    data = CleanData(
        Splits(stripes(num_train, labeled), test, "x"), Preprocessing((32, 32)), batch_size=8
    )
    return FeatureStore(data)


# ------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("num_test", [12, 0])
@pytest.mark.parametrize("name", ["raw pixels", "vit"])
def test_every_picture_is_drawn(tmp_path: Path, name: str, num_test: int) -> None:
    """Of any network, with one split or two; the same bytes again."""
    backbone = PIXELS if name == "raw pixels" else vit()
    told: list[str] = []
    for folder in ("a", "b"):
        drawn = draw_all(backbone, store(24, num_test), tmp_path / folder, say=told.append)
        assert list(drawn) == list(PICTURES)
    assert told == []
    for path in (tmp_path / "a").iterdir():
        assert np.array_equal(pixels_of(path), pixels_of(tmp_path / "b" / path.name)), path


def test_one_picture_that_fails_costs_no_other(tmp_path: Path) -> None:
    """Without labels there is no confusion, and a sentence says so; the rest is there."""
    told: list[str] = []
    drawn = draw_all(PIXELS, store(labeled=False), tmp_path, say=told.append)
    assert list(drawn) == [name for name in PICTURES if name != "confusion"]
    assert len(told) == 1
    assert told[0].startswith("confusion.png was not drawn: a confusion matrix needs labels")
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(drawn)


def test_a_failure_without_text_is_named_by_its_type(tmp_path: Path) -> None:
    """Instead of an empty reason."""

    def fails(*given: Any) -> None:
        raise NotImplementedError

    told: list[str] = []
    assert draw_all(PIXELS, store(), tmp_path, {"attention": fails}, told.append) == {}
    assert told == ["attention.png was not drawn: NotImplementedError"]


def test_unreadable_images_are_passed_over(tmp_path: Path) -> None:
    """In a split of which one cannot be read, all pictures are drawn."""
    source = first_broken(stripes(24))
    data = CleanData(Splits(source, None, "x"), Preprocessing((32, 32)), batch_size=8)
    assert list(draw_all(PIXELS, FeatureStore(data), tmp_path)) == list(PICTURES)


@pytest.mark.slow
def test_pretrain_and_evaluate_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run ends with the quick ones; evaluate draws all into `pictures`, and names them."""
    run = train(tmp_path)
    assert all((run / f"{name}.png").is_file() for name in QUICK)
    capsys.readouterr()
    folder = tmp_path / "pictures"
    evaluate(f"checkpoint={run}", f"pictures={folder}", f"runs_dir={tmp_path}", "accelerator=cpu")
    assert {path.stem for path in folder.iterdir()} == set(PICTURES)
    assert (
        "attention.png, pca.png, neighbors.png, confusion.png, map.png" in capsys.readouterr().out
    )


# -------------------------------------------------------------------------------------- components


def test_components_are_those_of_the_decomposition() -> None:
    """Up to their sign, which is fixed: turned rows give the same numbers, mirrored ones not other
    signs by chance.
    """
    rows = torch.randn(60, 7) * torch.tensor([5.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    found = components(rows, 3)
    centered = (rows - rows.mean(0)).double()
    u, s, _ = torch.linalg.svd(centered, full_matrices=False)
    torch.testing.assert_close(found.abs(), (u * s)[:, :3].abs(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(components(rows[torch.arange(59, -1, -1)], 3).flip(0), found)


def two_regions(num: int = 4, side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Features "n P D" of a square amid another region, and where it is."""
    inside = torch.zeros(num, side, side, dtype=torch.bool)
    inside[:, 3:9, 3:9] = True
    a, b = torch.randn(2, 8)
    features = torch.where(inside[..., None], 3 * a, 3 * b) + 0.1 * torch.randn(num, side, side, 8)
    return features.flatten(1, 2), inside.flatten(1)


def test_components_color_regions_apart() -> None:
    """Patches of one region are closer in color than patches of two."""
    features, inside = two_regions()
    colors = component_colors(features.flatten(0, 1)).reshape(*inside.shape, 3)
    assert colors.min() == 0
    assert colors.max() == 1
    red = colors[..., 0]
    assert abs(float(red[inside].mean() - red[~inside].mean())) > 0.8


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_lies_in_the_middle(sign: int) -> None:
    """Whichever way the component points."""
    features, inside = two_regions()
    assert torch.equal(foreground(sign * features, (12, 12)), inside)


class Shades(Backbone):
    """A network whose patch tokens are their patch's mean color, and its square."""

    patch_size, in_chans, embed_dim, num_blocks = 8, 3, 6, 1

    def __init__(self) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {"name": "shades"}
        self.register_buffer("one", torch.ones(1))

    def forward(self, images: torch.Tensor, mask: Any = None, cls_only: bool = False) -> Tokens:
        cells = torch.nn.functional.avg_pool2d(images, 8)
        patches = torch.cat([cells, cells.square()], dim=1).flatten(2).transpose(1, 2)
        return Tokens(patches.mean(1), patches, None, (cells.shape[2], cells.shape[3]))


def test_a_pca_picture_shows_regions(tmp_path: Path) -> None:
    """Two images of a square on a ground: squares share a color, which the ground has not; odd
    numbers of images lose none.
    """
    images = torch.rand(1, 3, 64, 96) * 0.1
    images[:, :, 16:48, 24:64] += torch.tensor([2.0, -1.0, 0.5])[:, None, None]
    network = Shades()
    pca_picture(network, images.repeat(2, 1, 1, 1), tmp_path / "two.png")
    two = pixels_of(tmp_path / "two.png").astype(int)
    height, width = 192 * 64 // 96, 192
    second = 36 + width + 30  # left of the patches of the first image
    middle = two[144 + height // 2, second + width // 2]
    corner = two[144 + 4, second + 4]
    assert np.abs(middle - corner).max() > 100
    third = second + width + 30
    assert (two[144 + 4, third + 4] == 255).all()  # the ground is no foreground
    assert (two[144 + height // 2, third + width // 2] < 255).any()
    pca_picture(network, images.repeat(3, 1, 1, 1), tmp_path / "three.png")
    assert pixels_of(tmp_path / "three.png").shape[0] == two.shape[0] + 2 * (height + 8)


# --------------------------------------------------------------------------------------- confusion


def test_confusion_counts_like_a_loop() -> None:
    """Row: the class; column: what it is taken for."""
    truth, found = torch.randint(0, 4, (50,)), torch.randint(0, 4, (50,))
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for t, p in zip(truth.tolist(), found.tolist(), strict=True):
        expected[t, p] += 1
    assert torch.equal(confusion(truth, found, 4), expected)


def test_the_most_confused_pairs_come_first() -> None:
    """By share of the class, not by number; what is right is no confusion."""
    counts = torch.tensor([[90, 10, 0], [2, 2, 0], [0, 1, 7]])
    pairs = most_confused(counts, 2)
    assert [tuple(pair) for pair in pairs] == [(1, 0, 2, 4), (2, 1, 1, 8)]


@pytest.mark.parametrize("num_classes", [2, 10, 40, 100, 250])
def test_a_confusion_matrix_stays_readable(tmp_path: Path, num_classes: int) -> None:
    """From 2 classes to more than are drawn, with names of any length, its page is no larger than a
    screen or two.
    """
    counts = torch.randint(0, 3, (num_classes, num_classes)) + 9 * torch.eye(num_classes).long()
    counts[1] = 0  # no image of it
    names = [f"a class called {i} at some length" for i in range(num_classes)]
    confusion_picture(counts, names, tmp_path / "c.png", "k-NN")
    height, width = pixels_of(tmp_path / "c.png").shape[:2]
    assert 250 < height < 1700
    assert 500 < width < 2200


def test_a_perfect_matrix_has_no_orange(tmp_path: Path) -> None:
    """Only what is taken for another is."""
    names, wrong = ["a", "b", "c"], 0xC4541A
    confusion_picture(torch.eye(3).long() * 5, names, tmp_path / "right.png")
    confusion_picture(
        torch.tensor([[0, 5, 0], [0, 5, 0], [0, 0, 5]]), names, tmp_path / "wrong.png"
    )
    area = (slice(130, None), slice(None, 300))  # without the legend
    counts = []
    for name in ("right", "wrong"):
        pixels = pixels_of(tmp_path / f"{name}.png")[area].astype(int)
        counts.append(int((pixels @ np.array([1 << 16, 1 << 8, 1]) == wrong).sum()))
    assert counts[0] == 0 < counts[1]
    with pytest.raises(UserError, match="at least 2 classes"):
        confusion_picture(torch.zeros(3, 3).long(), names, tmp_path / "none.png")


# ---------------------------------------------------------------------------------------- the map


def groups(num: int = 30) -> Features:
    """Three groups of features far apart."""
    labels = torch.arange(num) % 3
    return Features(5 * torch.eye(3)[labels] + 0.1 * torch.randn(num, 3), labels)


def test_groups_stay_together_on_the_map() -> None:
    """Each image's nearest on the map is of its group, and the map is the same each time."""
    features = groups()
    points = torch.from_numpy(project(features.features))
    distance = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert torch.equal(features.labels[distance.argmin(dim=1)], features.labels)
    np.testing.assert_array_equal(project(features.features), points.numpy())


def test_a_map_has_a_dot_or_a_thumbnail_for_each(tmp_path: Path) -> None:
    """Its size does not depend on how many there are; classes have their colors on it."""
    source = stripes(24)
    features, _ = pixel_features(CleanData(Splits(source, None, "x"), Preprocessing((32, 32)), 8))
    map_picture(features, source, tmp_path / "map.png")
    map_picture(features, source, tmp_path / "few.png", num_images=6)
    assert pixels_of(tmp_path / "map.png").shape == pixels_of(tmp_path / "few.png").shape
    assert {int(color[1:], 16) for color in palette(2)} <= colors_of(tmp_path / "map.png")


def test_a_map_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images; a method that there is; umap-learn for UMAP, which is then asked."""
    source = ArraySource(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), None, [], "x")
    with pytest.raises(UserError, match="5 images"):
        map_picture(Features(torch.randn(4, 3), torch.full((4,), -1)), source, tmp_path / "m.png")
    with pytest.raises(UserError, match="not by PCA"):
        project(torch.randn(9, 3), "PCA")
    monkeypatch.setattr(pictures_map, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install umap-learn"):
        project(torch.randn(9, 3), "UMAP")

    class UMAP:
        def __init__(self, **kwargs: Any) -> None:
            assert kwargs["random_state"] == 0

        def fit_transform(self, rows: np.ndarray) -> np.ndarray:
            return rows[:, :2]

    monkeypatch.setattr(pictures_map, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "umap", cast(Any, SimpleNamespace(UMAP=UMAP)))
    assert project(torch.randn(9, 3), "UMAP").shape == (9, 2)


# ------------------------------------------------------------------------------------ segmentation


def test_classes_are_painted_on_gray() -> None:
    """A pixel's color is its class's over the gray image; without a class it is gray."""
    image = np.full((1, 3, 3), 100, np.uint8)
    found = painted(image, np.array([[0, 1, -1]]), ["#ff0000", "#0000ff"])
    assert found.tolist() == [[[193, 40, 40], [40, 40, 193], [100, 100, 100]]]


def test_a_segmentation_sheet_has_a_row_an_image(tmp_path: Path) -> None:
    """With a legend of all classes, in lines where there are many."""
    image, mask = np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), np.int64)
    heights = []
    for num in (1, 2):
        args = ([image] * num, [mask] * num, [mask] * num)
        segmentation_picture(*args, [f"class {i}" for i in range(3)], tmp_path / "s.png")
        heights.append(pixels_of(tmp_path / "s.png").shape[0])
    assert heights[1] - heights[0] == 384 * 3 // 4 + 8
    segmentation_picture(*args, [f"class {i}" for i in range(60)], tmp_path / "many.png")
    assert pixels_of(tmp_path / "many.png").shape[0] > heights[1] + 100
    assert len(set(palette(60))) == 60


def test_a_legend_ends_where_the_page_does() -> None:
    """Whatever its length; a text that is too long ends in dots."""
    for num in (0, 1, 2, 9):
        page, _ = start_page(700, 300, "Title", [("#123456", "some meaning")] * num)
        drawn = np.argwhere((np.asarray(page) != 255).any(axis=2))
        assert drawn[:, 1].max() < page.width - 30
        assert drawn[:, 0].max() < page.height - 20
    assert shortened("short", 500, 16) == "short"
    assert shortened("a very long name", 60, 16).endswith("\u2026")
    assert isinstance(page, Image.Image)
