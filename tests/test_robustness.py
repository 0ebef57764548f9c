"""Corruptions do what they say, each image's its own; k-NN under them is a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dino_lite.config import compose
from dino_lite.contracts import Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.photometric import Normalize
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.eval.baselines import RawPixels
from dino_lite.eval.robustness import CORRUPTIONS, Robustness, blur, color, crop, noise
from dino_lite.eval.store import FeatureStore
from dino_lite.runs.subject import build_evaluations
from test_features import images, vit

NUMBERS = np.arange(4)


def pixels(num: int = 4, channels: int = 3) -> torch.Tensor:
    """Images of few, large parts."""
    parts = torch.rand(num, channels, 3, 4)
    return torch.nn.functional.interpolate(parts, size=(48, 64), mode="bilinear")


@pytest.mark.parametrize("name", list(CORRUPTIONS))
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_corruption_is_keyed_by_image_and_grows(name: str, channels: int) -> None:
    """An image is corrupted alike in any batch; stronger is farther from clean; values stay
    colors.
    """
    corruption, strengths, _ = CORRUPTIONS[name]
    clean = pixels(4, channels)
    found = [corruption(clean, NUMBERS, strength) for strength in strengths]
    alone = corruption(clean[2:3], NUMBERS[2:3], strengths[1])
    torch.testing.assert_close(alone[0], found[1][2])
    distances = [float((each - clean).square().mean()) for each in found]
    assert 0 < distances[0] < distances[1] < distances[2]
    for each in found:
        assert each.shape == clean.shape
        assert 0 <= each.min() <= each.max() <= 1.0001


def test_blur_keeps_what_is_even_and_spreads_a_point() -> None:
    """A constant image stays itself, at its edges too; a point becomes the Gaussian."""
    torch.testing.assert_close(
        blur(torch.full((1, 1, 9, 9), 0.3), NUMBERS[:1], 0.2)[0, 0, 0, 0], torch.tensor(0.3)
    )
    point = torch.zeros(1, 1, 21, 21)
    point[0, 0, 10, 10] = 1
    found = blur(point, NUMBERS[:1], 2 / 21)[0, 0]
    torch.testing.assert_close(found.sum(), torch.tensor(1.0), rtol=1e-4, atol=1e-4)
    ratio = float(found[10, 12] / found[10, 10])
    assert ratio == pytest.approx(np.exp(-0.5))  # one deviation, 2 pixels, away


def test_a_crop_of_a_slope_is_a_flatter_slope() -> None:
    """Half of the sides shows half of the values."""
    slope = torch.linspace(0, 1, 64).expand(1, 1, 64, 64).contiguous()
    found = crop(slope, NUMBERS[:1], 0.5)[0, 0]
    assert float(found[:, -1].mean() - found[:, 0].mean()) == pytest.approx(0.5, abs=0.02)


def test_noise_and_color_have_the_strength_they_are_given() -> None:
    """The deviation of the noise; factors between exp(-s) and exp(s)."""
    gray = torch.full((1, 3, 64, 64), 0.5)
    assert float((noise(gray, NUMBERS[:1], 0.1) - 0.5).std()) == pytest.approx(0.1, rel=0.05)
    found = color(torch.full((50, 3, 2, 2), 0.3), np.arange(50), 0.5) / 0.3
    assert np.exp(-0.5) <= float(found.min()) < 0.75 < 1.3 < float(found.max()) <= np.exp(0.5)


def store(train: Any, test: Any = None) -> FeatureStore:
    return FeatureStore(CleanData(Splits(train, test, "set"), Preprocessing((16, 16)), 4))


@pytest.mark.slow
@pytest.mark.parametrize("with_test", [True, False])
@pytest.mark.parametrize("name", ["raw pixels", "vit"])
def test_the_table_holds_every_corruption(name: str, with_test: bool) -> None:
    """Means and drops agree; clean accuracy is k-NN's; with one split a part is held out; the same
    again.
    """
    backbone = RawPixels(Normalize(), 8) if name == "raw pixels" else vit()
    train, test = images(30), images(12) if with_test else None
    evaluation = Robustness(k=3, max_images=8)
    found = evaluation(backbone, store(train, test))
    assert [row["corruption"] for row in found["table"]] == ["none", *CORRUPTIONS]
    values = [row[s] for row in found["table"][1:] for s in ("mild", "medium", "strong")]
    assert found["value"] == pytest.approx(np.mean(values))
    assert found["drop"] == pytest.approx(found["clean"] - found["value"])
    assert np.mean([row["drop"] for row in found["table"][1:]]) == pytest.approx(found["drop"])
    assert (found["num_train"], found["num_test"]) == ((30, 8) if with_test else (24, 6))
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    assert evaluation(backbone, store(train, test)) == found


def test_the_k_that_was_used_is_told() -> None:
    """A bank smaller than k is used whole."""
    backbone = RawPixels(Normalize(), 8)
    found = Robustness(k=20)(backbone, store(images(9), images(6)))
    assert found["settings"]["k"] == 9
    assert "k=9," in found["protocol"]


@pytest.mark.parametrize("changes", [{"k": 0}, {"max_images": 0}, {"temperature": 0.0}])
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    """By their key."""
    with pytest.raises(UserError, match=f"{next(iter(changes))}="):
        Robustness(**changes)


def test_it_is_configured_by_its_yaml() -> None:
    """Every key of the file is taken."""
    assert build_evaluations(compose("evaluate", ["eval=robustness"]))["robustness"].k == 20
