"""Pictures show what they say, of every kind of input, and are PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Crops, Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.photometric import Normalize
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.sources import ArraySource
from dino_lite.eval.curves import curves_picture, read_curve, running_mean
from dino_lite.eval.heat import heat, overlay
from dino_lite.eval.pictures import attention_picture, crops_picture, neighbors_picture
from images import Broken
from tiny import pixel_features


def crops(num_local: int = 4, num_images: int = 3) -> Crops:
    num = 2 + num_local
    local = torch.randint(256, (num_local, num_images, 3, 16, 16), dtype=torch.uint8)
    return Crops(
        torch.randint(256, (2, num_images, 3, 32, 32), dtype=torch.uint8),
        local if num_local else None,
        torch.arange(num_images),
        None,
        torch.zeros(num, num_images, 4),
        torch.zeros(num, num_images, 9),
    )


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def colors_of(path: Path) -> set[int]:
    return set(np.unique(numbers_of(pixels_of(path))).tolist())


def numbers_of(colors: np.ndarray) -> np.ndarray:
    """0xRRGGBB."""
    return colors.astype(int) @ np.array([1 << 16, 1 << 8, 1])


def test_crops_are_drawn_with_their_very_pixels(tmp_path: Path) -> None:
    """Small crops are enlarged by a whole factor, so that every color on the sheet is theirs."""
    batch = crops(num_images=1)
    crops_picture(batch, None, tmp_path / "crops.png")
    drawn = colors_of(tmp_path / "crops.png")
    for images in (batch.globals_, batch.locals_):
        assert images is not None
        colors = numbers_of(images.permute(0, 1, 3, 4, 2).numpy())
        assert set(colors.ravel().tolist()) <= drawn


@pytest.mark.parametrize("num_local", [0, 1, 4, 7])
def test_normalized_crops_look_like_the_bytes_they_were(tmp_path: Path, num_local: int) -> None:
    """The picture undoes Normalize, whatever the number of local crops."""
    batch, normalize = crops(num_local), Normalize()
    crops_picture(batch, None, tmp_path / "bytes.png")
    crops_picture(normalize.crops(batch), normalize, tmp_path / "floats.png")
    assert np.array_equal(pixels_of(tmp_path / "bytes.png"), pixels_of(tmp_path / "floats.png"))


def test_attention_is_drawn_for_each_head_asked_for(tmp_path: Path) -> None:
    """A picture of few heads is narrower than one of all; modes come back."""
    vit = ViT(image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=8).train()
    images = torch.randn(2, 3, 32, 48)  # not square: 4x6 patches
    attention_picture(vit, images, tmp_path / "two.png", Normalize(), num_heads=2)
    attention_picture(vit, images, tmp_path / "all.png", Normalize(), num_heads=8)
    assert pixels_of(tmp_path / "two.png").shape[1] < pixels_of(tmp_path / "all.png").shape[1]
    assert vit.training


def test_heat_is_bright_where_values_are_large() -> None:
    """Dark to bright; a constant map has one color and no warning."""
    values = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert heat(values)[0, 1].sum() > heat(values)[0, 0].sum()
    assert len(np.unique(heat(torch.ones(2, 2)).reshape(-1, 3), axis=0)) == 1
    laid = overlay(np.full((8, 8, 3), 128, np.uint8), values)
    assert laid.shape == (8, 8, 3)
    assert np.ptp(laid[0, 7].astype(int)) > np.ptp(laid[7, 0].astype(int))  # color over gray


def stripes(num: int, labeled: bool = True) -> ArraySource:
    """Image i is gray but for one column, by which it can be found again."""
    pixels = torch.full((num, 32, 32, 3), 100, dtype=torch.uint8)
    for i in range(num):
        pixels[i, :, i % 32] = torch.tensor([10 * i, 255 - 10 * i, 0], dtype=torch.uint8)
    labels = np.arange(num) % 2 if labeled else None
    return ArraySource(pixels, labels, ["even", "odd"] if labeled else [], f"stripes{num}")


def first_broken(source: ArraySource) -> Broken:
    """The first image of `source` cannot be read."""
    return Broken(source, lambda index: index == 0)


def blue_and_orange(path: Path) -> tuple[bool, bool]:
    colors = colors_of(path)
    return 0x1769AA in colors, 0xD9762B in colors


def test_frames_tell_same_class_from_another(tmp_path: Path) -> None:
    """Of two classes all neighbors together have both frames; without labels there is none."""
    data = CleanData(Splits(stripes(12), stripes(6), "x"), Preprocessing((32, 32)), batch_size=8)
    bank, queries = pixel_features(data)
    neighbors_picture(bank, data, tmp_path / "test.png", queries)
    assert blue_and_orange(tmp_path / "test.png") == (True, True)
    unlabeled = CleanData(
        Splits(stripes(12, False), None, "x"), Preprocessing((32, 32)), batch_size=8
    )
    neighbors_picture(pixel_features(unlabeled)[0], unlabeled, tmp_path / "none.png")
    assert blue_and_orange(tmp_path / "none.png") == (False, False)


def test_unreadable_images_do_not_shift_the_neighbors(tmp_path: Path) -> None:
    """Row 0 of the features is image 1 where image 0 is broken: its own color is on the sheet."""
    splits = Splits(first_broken(stripes(3, False)), None, "x")
    data = CleanData(splits, Preprocessing((32, 32)), batch_size=8)
    neighbors_picture(pixel_features(data)[0], data, tmp_path / "n.png", num_queries=1)
    assert {0x0AF500, 0x14EB00} <= colors_of(tmp_path / "n.png")


def test_curves_are_drawn_from_what_is_there(tmp_path: Path) -> None:
    """One panel without k-NN, two with it, two rows of them with the health of the run."""
    rows = [f"{step},{9 - step / 100}," for step in range(0, 500, 10)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,loss,knn", *rows]))
    curves_picture(tmp_path / "metrics.csv", tmp_path / "one.png")
    (tmp_path / "metrics.csv").write_text("\n".join(["step,loss,knn", *rows, "499,,51.5"]))
    curves_picture(tmp_path / "metrics.csv", tmp_path / "two.png")
    height, width = pixels_of(tmp_path / "one.png").shape[:2]
    assert pixels_of(tmp_path / "two.png").shape[1] == pytest.approx(2 * width, abs=2)
    columns = ["step,loss,knn,probe,teacher_entropy", "0,9,40,42,5", "9,8,50,51,6"]
    (tmp_path / "metrics.csv").write_text("\n".join(columns))
    curves_picture(tmp_path / "metrics.csv", tmp_path / "three.png")
    found = pixels_of(tmp_path / "three.png").shape[:2]
    assert found == (pytest.approx(2 * height, abs=2), pytest.approx(2 * width, abs=2))


def test_rows_without_a_number_are_passed_over(tmp_path: Path) -> None:
    """Blanks and NaN are no points, and points are in order of steps."""
    text = "knn,step\n30,20\n,21\nnan,22\n10.5,3\n"
    (tmp_path / "metrics.csv").write_text(text)
    assert read_curve(tmp_path / "metrics.csv", "knn").tolist() == [[3, 10.5], [20, 30]]
    assert read_curve(tmp_path / "metrics.csv", "loss").shape == (0, 2)


def test_the_running_mean_is_a_mean_of_neighbors() -> None:
    """As many as there are at the ends, a constant stays one."""
    assert running_mean(np.array([1.0, 2.0, 6.0, 3.0]), 3).tolist() == [1.5, 3.0, 11 / 3, 4.5]


@pytest.mark.parametrize("text", [None, "step,grad_norm\n1,2\n"])
def test_nothing_to_draw_is_a_sentence(tmp_path: Path, text: str | None) -> None:
    """No file, or none of the columns in it."""
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match="nothing to draw"):
        curves_picture(tmp_path / "metrics.csv", tmp_path / "curves.png")


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A place that cannot be written is a sentence, and no part of a file remains."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        crops_picture(crops(), None, tmp_path / "file" / "crops.png")
    crops_picture(crops(), None, tmp_path / "crops.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crops.png", "file"]
