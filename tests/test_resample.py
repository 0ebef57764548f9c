"""Boxes cut out by tensor operations: PIL's resize to within a gray level or two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_lite.data import exact, resample
from dino_lite.data.crops import MultiCrop


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise, of which no overshoot is cut off: PIL takes the cheaper direction first, and cuts."""
    rng = np.random.default_rng(seed)
    return rng.integers(64, 192, (height, width, channels), dtype=np.uint8)


def pil(pixels: np.ndarray, box: list[int], size: int) -> np.ndarray:
    """What PIL makes of a box."""
    return np.asarray(exact.resized_crop(Image.fromarray(pixels), box, size)).astype(int)


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal but for the rounding of either direction."""
    assert np.abs(found - wanted).max() <= 3
    assert np.abs(found - wanted).mean() <= 1


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """Height and width of an image, and a box in it."""
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    high, wide = draw(st.integers(1, height)), draw(st.integers(1, width))
    top, left = draw(st.integers(0, height - high)), draw(st.integers(0, width - wide))
    return height, width, [top, left, high, wide]


@settings(max_examples=60)
@given(place=boxes(), size=st.integers(1, 40), seed=st.integers(0, 9))
def test_both_ways_equal_pil(place: tuple[int, int, list[int]], size: int, seed: int) -> None:
    """Any box of any image, made smaller or larger, also a single pixel."""
    height, width, box = place
    pixels = picture(height, width, seed=seed)
    wanted = pil(pixels, box, size)
    cut = resample.resized_crop(pixels, box, size).astype(int)
    near(cut, wanted)
    whole = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    made = resample.resized_crops(whole, torch.tensor([[box]]).float(), size)[0, 0]
    near(made.permute(1, 2, 0).numpy(), wanted)
    assert torch.equal(made, made.round())


def test_kernel_is_keys_cubic() -> None:
    """Against its two pieces, written out (a = -1/2)."""
    x = torch.linspace(-3, 3, 601)
    a, t = -0.5, x.abs()
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    wanted = torch.where(t <= 1, near, torch.where(t < 2, far, 0.0))
    torch.testing.assert_close(resample.bicubic(x), wanted, rtol=0, atol=1e-6)


@given(size=st.integers(1, 40), length=st.integers(1, 50), start=st.integers(0, 20))
def test_weights_add_up_to_one_and_stay_in_the_box(size: int, length: int, start: int) -> None:
    """Whatever the scale: nothing outside has a part."""
    found = resample.weights(torch.tensor([1.0 * start]), torch.tensor([1.0 * length]), size, 80)[0]
    torch.testing.assert_close(found.sum(1), torch.ones(size))
    assert not found[:, :start].any()
    assert not found[:, start + length :].any()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_channels_are_resized_alike(channels: int) -> None:
    """Each channel of many is what it would be alone."""
    pixels = picture(50, 40, channels)
    many = resample.resized_crop(pixels, [3, 4, 40, 30], 16)
    for i in range(channels):
        alone = resample.resized_crop(pixels[..., i : i + 1], [3, 4, 40, 30], 16)
        assert np.abs(many[..., i].astype(int) - alone[..., 0]).max() <= 1


def test_all_crops_are_cut_where_they_were_drawn() -> None:
    """Every crop of every image, of different sizes."""
    images = [picture(40, 60), picture(33, 20), picture(16, 16)]
    multi_crop = MultiCrop(20, 10, 2, seed=1)
    heights, widths = np.array([40, 33, 16]), np.array([60, 20, 16])
    drawn = multi_crop.draw(np.array([0, 1, 1]), np.array([5, 0, 9]), heights, widths)
    out = [np.empty((3, size, size, 3), np.uint8) for size in multi_crop.sizes]
    resample.make_crops(images, drawn, out)
    for i, image in enumerate(images):
        for made, box in zip(out, drawn.boxes[:, i].tolist(), strict=True):
            near(made[i], pil(image, box, made.shape[1]))


def test_a_crop_of_its_own_size_is_not_touched() -> None:
    """A box of size x size pixels is taken as it is."""
    pixels = picture(30, 30)
    pixels.flags.writeable = False  # as decoders give it
    cut = resample.resized_crop(pixels, [2, 3, 20, 20], 20)
    assert np.array_equal(cut, pixels[2:22, 3:23])
    assert resample.resized_crop(pixels, [0, 0, 30, 30], 20).shape == (20, 20, 3)
