"""A linear head on patch tokens: masks, pixels between patches, IoU and its interval."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino_lite.config import compose
from dino_lite.contracts import Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.photometric import Normalize
from dino_lite.data.pixel_labels import fitted, open_masks
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.eval.baselines import RawPixels
from dino_lite.eval.segmentation import Segmentation, confusion, iou, iou_interval
from dino_lite.eval.segmenter import (
    Pixels,
    Segmenter,
    between_patches,
    draw_pixels,
    train_heads,
)
from dino_lite.eval.store import FeatureStore
from dino_lite.runs.subject import build_evaluations
from test_features import images, vit

CPU = torch.device("cpu")
PALE, DARK, NOTHING = 3, 7, 250  # numbers in masks, with gaps


def scene(folder: Path, split: str, name: str, seed: int, size: tuple[int, int] = (24, 40)) -> None:
    """A dark square on pale ground, both noisy, its frame without a class."""
    generator = np.random.default_rng(seed)
    mask = np.full(size, PALE, np.uint8)
    top, left = generator.integers(0, size[0] - 12), generator.integers(0, size[1] - 12)
    mask[top : top + 12, left : left + 12] = DARK
    mask[top, left : left + 12] = NOTHING
    level = np.where(mask == PALE, 180, 60)[..., None] + generator.integers(0, 40, (*size, 3))
    for kind, pixels in (("images", level.astype(np.uint8)), ("masks", mask)):
        path = folder / kind / split / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Six to learn from, one of another size; three to be asked."""
    for i in range(6):
        scene(tmp_path, "train", f"town/{i}", i, (32, 24) if i == 2 else (24, 40))
    for i in range(3):
        scene(tmp_path, "val", str(i), 10 + i)
    return tmp_path


def store() -> FeatureStore:
    """Of other images than those that are segmented."""
    return FeatureStore(CleanData(Splits(images(4), None, "set"), Preprocessing((16, 16)), 4))


def segmentation(root: Path | None, **changes: Any) -> Segmentation:
    settings = {"ignore": NOTHING, "num_pixels": 600, "num_steps": 60, "rates": [1e-2, 1e-1]}
    return Segmentation(root, **(settings | {"batch_size": 256} | changes))


def test_masks_are_numbers_however_they_are_stored(scenes: Path) -> None:
    """A palette's numbers, not its colors; what is ignored is -1; splits and subfolders pair."""
    train, test = open_masks(scenes, [NOTHING])
    assert test is not None
    assert (len(train), len(test), train.numbers()) == (6, 3, [PALE, DARK])
    path = scenes / "masks" / "val" / "1.png"
    with Image.open(path) as image:
        numbers = np.asarray(image)
    colored = Image.fromarray(numbers).convert("P")
    colored.putpalette([5, 6, 7] * 256)
    colored.save(path)
    expected = np.where(numbers == NOTHING, -1, numbers.astype(int))
    found = test.read(1)
    assert np.array_equal(found.classes, expected)
    assert found.image.shape == (*numbers.shape, 3)
    assert np.array_equal(test.part([1, 2]).part([0]).read(0).classes, expected)


def broken(root: Path, how: str) -> None:
    mask = root / "masks" / "val" / "1.png"
    if how == "colors":
        Image.new("RGB", (40, 24)).save(mask)
    elif how == "size":
        Image.new("L", (40, 25)).save(mask)
    elif how == "missing":
        mask.unlink()
    elif how == "damaged":
        mask.write_bytes(mask.read_bytes()[:60])
    elif how == "one class":
        for path in (root / "masks").rglob("*.png"):
            with Image.open(path) as image:
                Image.new("L", image.size, 5).save(path)
    elif how == "image":
        (root / "images" / "val" / "1.png").write_text("no image")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("colors", "of mode RGB: a mask holds a class number"),
        ("size", r"40x25 pixels, but its image 40x24"),
        ("missing", "1 of 3 images have no mask"),
        ("damaged", "cannot be read as a mask"),
        ("one class", r"have 1 class \("),
        ("image", "cannot be read"),
    ],
)
def test_what_is_wrong_with_the_masks_is_a_sentence(scenes: Path, how: str, told: str) -> None:
    """It names the file and what to do."""
    broken(scenes, how)
    with pytest.raises(UserError, match=told):
        segmentation(scenes)(RawPixels(Normalize(), 8), store())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"root": None}, "root is not set"),
        ({"rates": []}, "numbers above 0"),
        ({"rates": [0.0]}, "numbers above 0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"shorter": 0}, "shorter=0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], told: str) -> None:
    """Before anything is read."""
    with pytest.raises(UserError, match=told):
        segmentation(changes.pop("root", Path("x")), **changes)


def test_a_folder_without_the_two_parts_is_refused(tmp_path: Path) -> None:
    """The sentence says what belongs there."""
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="no folder masks"):
        open_masks(tmp_path)


@pytest.mark.parametrize(
    ("size", "patch", "shorter", "expected"),
    [
        ((360, 480), 8, None, (360, 480)),
        ((360, 480), 16, None, (368, 480)),
        ((360, 480), 16, 240, (240, 320)),
        ((5, 40), 16, None, (16, 48)),
    ],
)
def test_images_get_sides_that_patches_divide(
    size: tuple[int, int], patch: int, shorter: int | None, expected: tuple[int, int]
) -> None:
    """The nearest multiple, at least one patch; an image that fits is not touched."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = fitted(image, patch, shorter)
    assert found.shape == (*expected, 3)
    assert (found is image) == (size == expected)


@pytest.mark.parametrize(
    ("grid", "size"), [((3, 5), (24, 40)), ((2, 4), (17, 9)), ((1, 1), (4, 4))]
)
def test_a_pixels_logits_are_those_of_upsampled_maps(
    grid: tuple[int, int], size: tuple[int, int]
) -> None:
    """Taking features between patches, then the head, is the head and then interpolation."""
    features = torch.randn(*grid, 6)
    head = Segmenter(torch.randn(6, 4), torch.randn(4))
    pixels = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1]))
    found = head.logits(between_patches(features, pixels, size))
    maps = F.interpolate(head.logits(features).permute(2, 0, 1)[None], size, mode="bilinear")[0]
    torch.testing.assert_close(found, maps.flatten(1).T, rtol=1e-4, atol=1e-5)
    assert torch.equal(head.predict(features, size), maps.argmax(dim=0))


def test_pixels_are_drawn_alike_from_each_image(scenes: Path) -> None:
    """As many of each, only ones that have a class, their own class, and the same each time."""
    train, _ = open_masks(scenes, [NOTHING])
    pixels = RawPixels(Normalize(), 8)
    first, again = (
        draw_pixels(pixels, train, [PALE, DARK], Normalize(), 300, seed=1) for _ in range(2)
    )
    assert torch.bincount(first.image).tolist() == [50] * 6
    assert set(first.classes.tolist()) == {0, 1}
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    other = draw_pixels(pixels, train, [PALE, DARK], Normalize(), 300, seed=2)
    assert not torch.equal(first.features, other.features)


def test_heads_learn_alone_though_trained_together() -> None:
    """A head is the same beside others; the global generator is left as it was."""
    features = torch.randn(200, 5) * 3 + 1
    pixels = Pixels(features, (features[:, 0] > 1).long(), torch.arange(200))
    before = torch.get_rng_state()
    both = train_heads(pixels, 2, [1e-3, 1e-1], 50, 32, 1e-3, CPU)
    alone = train_heads(pixels, 2, [1e-1], 50, 32, 1e-3, CPU)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(both[1], alone)
    hits = [(head.logits(features).argmax(1) == pixels.classes).float().mean() for head in both]
    assert hits[1] > 0.9


def loops_iou(truth: list[int], predicted: list[int], num_classes: int) -> list[float]:
    """Pixel by pixel, by the definition; NaN for a class that no pixel has."""
    found = []
    for c in range(num_classes):
        both = sum(t == c and p == c for t, p in zip(truth, predicted, strict=True))
        any_ = sum(t == c or p == c for t, p in zip(truth, predicted, strict=True))
        found.append(both / any_ if c in truth else math.nan)
    return found


def test_iou_equals_plain_loops() -> None:
    """Class 3 is predicted, but nowhere true."""
    truth, predicted = torch.randint(0, 3, (60,)), torch.randint(0, 4, (60,))
    found = iou(confusion(truth, predicted, 4).double())
    expected = loops_iou(truth.tolist(), predicted.tolist(), 4)
    assert found.tolist() == pytest.approx(expected, nan_ok=True)
    assert math.isnan(found[3])


def test_the_interval_is_that_of_images_drawn_anew() -> None:
    """It holds the mean IoU, has no width where all images are alike, and is the same each time."""
    truth, predicted = torch.randint(0, 3, (20, 50)), torch.randint(0, 3, (20, 50))
    counts = torch.stack([confusion(t, p, 3) for t, p in zip(truth, predicted, strict=True)])
    low, high = iou_interval(counts)
    assert low < 100 * float(iou(counts.sum(0).double()).mean()) < high
    assert iou_interval(counts) == (low, high)
    alike = iou_interval(counts[:1].expand(20, -1, -1))
    assert alike[0] == pytest.approx(alike[1])


def test_a_rare_class_stays_in_every_sample() -> None:
    """One image of 30 has a class that is hardly found: samples without it do not lift the mean;
    class 3 is predicted but nowhere true, and no class of it.
    """
    counts = torch.zeros(30, 4, 4, dtype=torch.int64)
    counts[:, 0, 0], counts[:, 1, 1], counts[:, 0, 3] = 80, 80, 2
    counts[0, 2] = torch.tensor([90, 0, 10, 0])
    value = 100 * float(iou(counts.sum(dim=0).double())[:3].mean())
    low, high = iou_interval(counts)
    assert low <= value <= high
    assert high - low < 4


@pytest.mark.parametrize("name", ["raw pixels", "untrained"])
def test_a_head_tells_dark_from_pale(scenes: Path, name: str) -> None:
    """Far better than one class everywhere, by any network, on images of several sizes; the result
    says how, by class, and the same again.
    """
    backbone = RawPixels(Normalize(), 8) if name == "raw pixels" else vit()
    evaluation = segmentation(scenes, classes=["", "", "", "ground"])
    found = evaluation(backbone, store())
    assert found["value"] > 55  # ground everywhere: 40
    assert found["value"] == pytest.approx(np.mean([row["IoU %"] for row in found["table"]]))
    assert [row["class"] for row in found["table"]] == ["ground", str(DARK)]
    assert sum(row["pixels %"] for row in found["table"]) == pytest.approx(100)
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    assert (found["num_train"], found["num_test"]) == (6, 3)
    assert evaluation(backbone, store()) == found


def test_it_draws_what_it_predicts(scenes: Path, tmp_path: Path) -> None:
    """A row for each of its three test images, 384 pixels wide and in proportion high."""
    path = tmp_path / "segmentation.png"
    segmentation(scenes).draw(RawPixels(Normalize(), 8), store(), path)
    with Image.open(path) as image:
        assert image.height > 144 + 3 * 384 * 24 // 40
        assert image.width > 3 * 384


def test_it_draws_from_the_head_it_trained(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the backbone it draws, another measured since or not."""
    evaluation = segmentation(scenes)
    own, other = (RawPixels(Normalize(), 8) for _ in range(2))
    for backbone in (own, other):
        evaluation(backbone, store())
    monkeypatch.setattr(evaluation, "fit", None)
    evaluation.draw(own, store(), tmp_path / "segmentation.png")
    assert evaluation._segmenters[own] is not evaluation._segmenters[other]


def test_one_split_is_taken_apart(scenes: Path) -> None:
    """Every fifth image is asked, and not learned from."""
    for kind in ("images", "masks"):
        for path in (scenes / kind / "val").iterdir():
            path.unlink()
        (scenes / kind / "val").rmdir()
    parts = segmentation(scenes).open()
    assert (parts.train.rows, parts.test.rows) == ([0, 1, 2, 3, 5], [4])


def test_the_test_images_choose_no_rate(scenes: Path) -> None:
    """Other masks of test leave head and rate as they are."""
    evaluation, backbone = segmentation(scenes), RawPixels(Normalize(), 8)
    before = evaluation.fit(backbone, Normalize(), evaluation.open())
    for path in (scenes / "masks" / "val").iterdir():
        with Image.open(path) as image:
            Image.fromarray(np.where(np.asarray(image) == PALE, DARK, PALE).astype(np.uint8)).save(
                path
            )
    after = evaluation.fit(backbone, Normalize(), evaluation.open())
    assert torch.equal(before[0].weight, after[0].weight)
    assert before[1] == after[1]


def test_it_is_configured_by_its_yaml(scenes: Path) -> None:
    """And without a folder refused, by the key that is missing."""
    asked = [
        "eval=segmentation",
        f"eval.segmentation.root={scenes}",
        "eval.segmentation.ignore=[11]",
    ]
    built = build_evaluations(compose("evaluate", asked))["segmentation"]
    assert (built.ignore, built.num_pixels) == ([11], 200_000)
    with pytest.raises(UserError, match=r"eval\.segmentation\.root"):
        build_evaluations(compose("evaluate", ["eval=segmentation"]))
