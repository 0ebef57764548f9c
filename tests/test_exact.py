"""The exact path: every operation as torchvision does it on PIL images, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tv
from torchvision.transforms.functional import InterpolationMode

from dino_lite.data import exact
from dino_lite.data.crops import COLUMNS, JITTER, ORDERS, Drawn, MultiCrop


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth color with noise on it: values, hues and edges of every kind."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def params(**values: float) -> list[float]:
    """COLUMNS, all neutral but those given."""
    return [float(value) for value in (COLUMNS | values).values()]


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), factor=st.floats(0, 2), shift=st.floats(-0.5, 0.5))
def test_jitter_equals_torchvision_on_pil(seed: int, factor: float, shift: float) -> None:
    """Every one of the four operations, bit by bit."""
    image = picture(19, 23, seed)
    oracle = {
        "brightness": tv.adjust_brightness(image, factor),
        "contrast": tv.adjust_contrast(image, factor),
        "saturation": tv.adjust_saturation(image, factor),
    }
    for name, wanted in oracle.items():
        found = exact.augment(image, params(**{name: factor}))
        assert np.array_equal(found, np.asarray(wanted)), name
    if shift != 0:  # a hue of exactly 0 says "not applied"
        found = exact.augment(image, params(hue=shift))
        assert np.array_equal(found, np.asarray(tv.adjust_hue(image, shift)))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    order=st.integers(0, 23),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    radius=st.floats(0.1, 3),
    box=st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 30), st.integers(1, 30)),
)
def test_a_whole_chain_equals_torchvision_on_pil(
    seed: int,
    order: int,
    flags: tuple[bool, bool, bool, bool],
    radius: float,
    box: tuple[int, int, int, int],
) -> None:
    """Resized crop, flip, jitter in any order, gray, blur, solarize: each where it belongs."""
    image = picture(50, 50, seed)
    flip, gray, blur, solarize = flags
    factors = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.2, "hue": -0.07}
    wanted = tv.resized_crop(image, *box, [24, 24], InterpolationMode.BICUBIC)
    wanted = tv.hflip(wanted) if flip else wanted
    for i in ORDERS[order]:
        wanted = getattr(tv, f"adjust_{JITTER[i]}")(wanted, factors[JITTER[i]])
    wanted = tv.to_grayscale(wanted, 3) if gray else wanted
    wanted = wanted.filter(ImageFilter.GaussianBlur(radius)) if blur else wanted
    wanted = ImageOps.solarize(wanted) if solarize else wanted
    values = params(
        **factors, order=order, flip=flip, gray=gray, blur=radius * blur, solarize=solarize
    )
    assert np.array_equal(exact.apply(image, box, values, 24), np.asarray(wanted))


def test_a_neutral_crop_of_the_whole_image_is_the_image() -> None:
    """Nothing drawn, nothing changed."""
    image = picture(32, 32)
    found = exact.apply(image, (0, 0, 32, 32), params(), 32)
    assert np.array_equal(found, np.asarray(image))


def test_pixels_outside_the_box_have_no_part() -> None:
    """The box is cut out before it is resized: its surroundings may be anything."""
    image = picture(40, 40)
    surroundings = np.zeros((40, 40, 3), np.uint8)
    surroundings[5:25, 10:30] = np.asarray(image)[5:25, 10:30]
    box = (5, 10, 20, 20)
    found = exact.apply(Image.fromarray(surroundings), box, params(), 12)
    assert np.array_equal(found, exact.apply(image, box, params(), 12))


def test_all_crops_are_made_as_they_were_drawn() -> None:
    """Every crop of every image, of different sizes, equals `apply` on its draw."""
    images = [picture(40, 60, 1), picture(33, 20, 2), picture(16, 16, 3)]
    multi_crop = MultiCrop(20, 10, 2, seed=1)
    heights, widths = np.array([40, 33, 16]), np.array([60, 20, 16])
    drawn = multi_crop.draw(np.array([0, 1, 1]), np.array([5, 0, 9]), heights, widths)
    out = [np.empty((3, size, size, 3), np.uint8) for size in multi_crop.sizes]
    exact.make_crops([np.asarray(image) for image in images], drawn, out)
    for i, image in enumerate(images):
        for s, made in enumerate(out):
            box, row = drawn.boxes[s, i].tolist(), drawn.params[s, i].tolist()
            assert np.array_equal(made[i], exact.apply(image, box, row, made.shape[1]))


def test_one_channel_is_a_gray_image() -> None:
    """The crops of a gray image, and one of their three equal channels."""
    gray = np.asarray(picture(40, 30).convert("L"))[..., None]
    multi_crop = MultiCrop(16, 8, 1)
    drawn = multi_crop.draw(np.zeros(1, int), np.arange(1), np.array([40]), np.array([30]))
    thin = [np.empty((1, size, size, 1), np.uint8) for size in multi_crop.sizes]
    exact.make_crops([gray], drawn, thin)
    color = [np.empty((1, size, size, 3), np.uint8) for size in multi_crop.sizes]
    exact.make_crops([np.repeat(gray, 3, axis=2)], drawn, color)
    for one, three in zip(thin, color, strict=True):
        assert np.array_equal(np.repeat(one, 3, axis=3), three)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 99),
    sigma=st.floats(0.1, 3),
    kernel=st.sampled_from([3, 9]),
    sides=st.tuples(st.integers(5, 30), st.integers(5, 30)),
)
def test_a_true_gaussian_equals_torchvision(
    seed: int, sigma: float, kernel: int, sides: tuple[int, int]
) -> None:
    """In color and gray, edges included: halves of a level may be rounded otherwise."""
    image = picture(*sides, seed)
    for wanted_of in (image, image.convert("L")):
        wanted = np.asarray(tv.gaussian_blur(wanted_of, [kernel, kernel], [sigma, sigma]))
        found = np.asarray(exact.gaussian_blur(wanted_of, sigma, kernel))
        assert np.abs(found.astype(int) - wanted).max() <= 1
        assert (found != wanted).mean() < 0.01


def test_the_kernel_chooses_the_blur_of_a_crop() -> None:
    """With it a true Gaussian, at its place in the chain; without, PIL's."""
    image, row = picture(20, 20), params(blur=1.5, gray=1, solarize=1)
    gray = image.convert("L")
    for kernel, blurred in (
        (None, gray.filter(ImageFilter.GaussianBlur(1.5))),
        (9, exact.gaussian_blur(gray, 1.5, 9)),
    ):
        wanted = np.asarray(ImageOps.solarize(blurred.convert("RGB")))
        assert np.array_equal(exact.augment(image, row, kernel), wanted)
        assert np.array_equal(exact.apply(image, (0, 0, 20, 20), row, 20, kernel), wanted)
        out = [np.empty((1, 20, 20, 3), np.uint8)]
        drawn = Drawn(np.array([[[0, 0, 20, 20]]]), np.array([[row]], np.float32))
        exact.make_crops([np.asarray(image)], drawn, out, kernel)
        assert np.array_equal(out[0][0], wanted)


@pytest.mark.parametrize("vertical", [0, 1])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_turns_come_after_flips(vertical: int, turns: int) -> None:
    """Mirrored, then upside down, then turned counter-clockwise."""
    image = picture(9, 9)
    wanted = np.asarray(image)[:, ::-1]
    wanted = wanted[::-1] if vertical else wanted
    found = exact.augment(image, params(flip=1, vertical=vertical, turns=turns))
    assert np.array_equal(found, np.rot90(wanted, turns))
