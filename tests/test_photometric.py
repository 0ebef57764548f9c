"""What the device does to pixels: PIL's arithmetic on whole batches, and normalization."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_lite.contracts import Crops, UserError
from dino_lite.data import exact
from dino_lite.data.crops import COLUMNS, MultiCrop, Photometric
from dino_lite.data.photometric import Normalize, box_blur, change, photometric
from dino_lite.data.resample import resized_crops
from ranks import apart


def picture(size: int, seed: int = 0) -> np.ndarray:
    """Smooth color with noise on it: values, hues and edges of every kind."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)


def batch(images: list[np.ndarray]) -> torch.Tensor:
    """n C h w, bytes."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def params(**values: float) -> list[float]:
    """COLUMNS, all neutral but those given."""
    return [float(value) for value in (COLUMNS | values).values()]


# ---------------------------------------------------------------------------------- photometric


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("flip", 1), ("vertical", 1), ("turns", 1), ("turns", 2), ("turns", 3)),
        *(("gray", 1), ("solarize", 1)),
        *((name, f) for name in ("brightness", "contrast", "saturation") for f in (0.6, 1.37)),
    ],
)
def test_one_operation_equals_pil_to_the_bit(name: str, value: float) -> None:
    """All that is not hue or blur, up to a rounding in a thousand values."""
    images = [picture(24, seed) for seed in range(5)]
    row = params(**{name: value})
    found = change(batch(images), torch.tensor([row] * 5)).permute(0, 2, 3, 1).numpy()
    wanted = np.stack([exact.augment(Image.fromarray(image), row) for image in images])
    assert np.abs(found - wanted).max() <= 1
    assert (found != wanted).mean() <= 1e-3


@given(levels=st.integers(1, 127), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 99))
def test_hue_equals_pil_but_for_few_roundings(levels: int, sign: int, seed: int) -> None:
    """One pixel of a hundred may be a level of the circle off: six gray levels, about."""
    image, row = picture(24, seed), params(hue=sign * (levels + 0.5) / 255)
    found = change(batch([image]), torch.tensor([row]))[0].permute(1, 2, 0).numpy()
    distance = np.abs(found - exact.augment(Image.fromarray(image), row).astype(int))
    assert distance.max() <= 7
    assert (distance > 0).any(-1).mean() <= 0.1


@given(radius=st.floats(0.01, 4), size=st.integers(1, 30), seed=st.integers(0, 99))
def test_blur_equals_pil(radius: float, size: int, seed: int) -> None:
    """Any radius and size, edges included: halves may be rounded otherwise."""
    image, row = picture(size, seed), params(blur=radius)
    found = change(batch([image]), torch.tensor([row]))[0].permute(1, 2, 0).numpy()
    wanted = exact.augment(Image.fromarray(image), row).astype(int)
    assert np.abs(found - wanted).max() <= 2
    assert np.abs(found - wanted).mean() <= 0.3


@given(sigma=st.floats(0.05, 4), size=st.integers(1, 30), seed=st.integers(0, 99))
def test_a_true_gaussian_is_the_workers(sigma: float, size: int, seed: int) -> None:
    """Any deviation and size, also crops smaller than the kernel; a crop without blur is left."""
    image, row = picture(size, seed), params(blur=sigma)
    images, rows = batch([image, image]), torch.tensor([row, params()])
    found, plain = change(images, rows, blur_kernel=9).permute(0, 2, 3, 1).numpy()
    distance = np.abs(found - exact.augment(Image.fromarray(image), row, 9).astype(int))
    assert distance.max() <= 1
    assert distance.mean() < 0.01
    assert np.array_equal(plain, image)


def test_a_box_blur_keeps_the_mean_of_a_constant() -> None:
    """Rows add up to 1 but for the rounding that PIL has."""
    box = box_blur(torch.tensor([0.0, 0.1, 0.7, 2.0, 9.0]), 12)
    torch.testing.assert_close(box.sum(-1), torch.ones(5, 12), rtol=0, atol=2e-6)
    torch.testing.assert_close(box[0], torch.eye(12), rtol=0, atol=1e-6)


@settings(max_examples=20)
@given(seed=st.integers(0, 999))
def test_drawn_crops_equal_pil(seed: int) -> None:
    """Whole chains as they are drawn, flips, turns and all: almost every value is the same."""
    kind = Photometric(vertical_prob=0.5, quarter_turns=True, solarize_prob=0.5)
    multi_crop = MultiCrop(20, 10, 1, global_1=kind, global_2=kind, local=kind, seed=seed)
    side = np.full(8, 20)
    drawn = multi_crop.draw(np.zeros(8, int), np.arange(8), side, side).params[0]
    images = [picture(20, seed + i) for i in range(8)]
    found = change(batch(images), torch.from_numpy(drawn)).permute(0, 2, 3, 1).numpy()
    wanted = [
        exact.augment(Image.fromarray(im), row)
        for im, row in zip(images, drawn.tolist(), strict=True)
    ]
    distance = np.abs(found - np.stack(wanted).astype(int))
    assert distance.mean() <= 0.25
    assert np.percentile(distance, 99) <= 3


@pytest.mark.parametrize("num", [1, 3])
def test_each_operation_leaves_memory_that_the_next_can_write_to(num: int) -> None:
    """All crops gray (or flipped, blurred …), some changed further, then normalized in place."""
    images = batch([picture(16, seed) for seed in range(num)])
    for name in COLUMNS:
        rows = torch.tensor([params(**{name: 1.0, "gray": 1.0})] * num)
        rows[0, list(COLUMNS).index("blur")] = 1.0
        rows[-1, list(COLUMNS).index("solarize")] = 1.0
        found = change(images, rows)
        assert torch.isfinite(Normalize()(found)).all()


def test_crops_do_not_depend_on_their_neighbors() -> None:
    """Each crop of a batch is what it would be alone."""
    multi_crop = MultiCrop(16, 8, 0)
    side = np.full(12, 16)
    drawn = torch.from_numpy(multi_crop.draw(np.zeros(12, int), np.arange(12), side, side).params)
    images = batch([picture(16, seed) for seed in range(12)])
    together = change(images, drawn[0])
    for i in range(12):
        assert torch.equal(change(images[i : i + 1], drawn[0, i : i + 1])[0], together[i])


def test_the_input_is_not_written_to() -> None:
    """Bytes or floats, it may be looked at again."""
    images = batch([picture(16)]).float()
    before = images.clone()
    change(images, torch.tensor([params(brightness=0.5, solarize=1)]))
    assert torch.equal(images, before)


def test_what_has_no_color_has_no_hue() -> None:
    """Of one channel, or five: saturation, hue and gray leave it alone, the rest does not."""
    for channels in (1, 5):
        images = torch.randint(0, 256, (2, channels, 8, 8), dtype=torch.uint8)
        row = params(saturation=0.5, hue=0.1, gray=1)
        assert torch.equal(change(images, torch.tensor([row] * 2)), images.float())
        row = params(contrast=0.5)
        assert not torch.equal(change(images, torch.tensor([row] * 2)), images.float())


def test_global_and_local_crops_have_their_own_draws() -> None:
    """The first G rows belong to the global crops."""
    x = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    draws = torch.tensor(params()).repeat(4, 3, 1)
    draws[1, 2], draws[3, 0] = torch.tensor(params(flip=1)), torch.tensor(params(solarize=1))
    crops = Crops(x, x[..., :4, :4], torch.arange(3), None, torch.rand(4, 3, 4), draws)
    found = photometric(crops)
    assert found.locals_ is not None
    wanted, small = x.float(), x[..., :4, :4].float()
    wanted[1, 2] = wanted[1, 2].flip(-1)
    small[1, 0] = torch.where(small[1, 0] >= 128, 255 - small[1, 0], small[1, 0])
    assert torch.equal(found.globals_, wanted)
    assert torch.equal(found.locals_, small)


def compiled_is_plain() -> None:
    """A whole graph of each function, or an error."""
    side = np.full(6, 16)
    drawn = MultiCrop(16, 8, 0).draw(np.zeros(6, int), np.arange(6), side, side)
    params, boxes = torch.from_numpy(drawn.params[0]), torch.from_numpy(drawn.boxes).float()
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    cut = images.float(), boxes, 8
    for function, arguments in ((change, (images, params)), (resized_crops, cut)):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert (compiled(*arguments) - function(*arguments)).abs().max() <= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2


@pytest.mark.slow
def test_it_compiles_to_one_graph() -> None:
    """Without a break, and with the plain function's results (no code is generated here)."""
    apart(compiled_is_plain)


# ------------------------------------------------------------------------------------ normalize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_byte_follows_the_formula(dtype: torch.dtype) -> None:
    """(x/255 - mean)/std of all 256 values, as exact as the type allows."""
    mean, std = (0.1, 0.5, 0.9), (0.3, 0.2, 0.7)
    x = torch.arange(256, dtype=torch.uint8).expand(2, 3, 256).reshape(2, 3, 16, 16)
    found = Normalize(mean, std)(x, dtype)
    shape = (3, 1, 1)
    m, s = (torch.tensor(v, dtype=torch.float64).view(shape) for v in (mean, std))
    wanted = (x.double() / 255 - m) / s
    assert found.dtype == dtype
    # bfloat16: rounded once, after the arithmetic.
    bound = {torch.float64: 1e-15, torch.float32: 4e-7, torch.bfloat16: 2**-8}[dtype]
    assert (found.double() - wanted).abs().max() <= bound * wanted.abs().max()


def test_bytes_in_any_memory_order_become_contiguous() -> None:
    """Workers deliver height, width, channel: values stay in place, memory is put in order."""
    x = torch.randint(0, 256, (2, 5, 8, 8, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    found = Normalize()(x)
    assert found.is_contiguous()
    assert torch.equal(found, Normalize()(x.contiguous()))


def test_all_crops_are_normalized_and_nothing_else() -> None:
    """Global, local and extra crops; index, labels, boxes and draws stay."""
    x = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    crops = Crops(
        globals_=x,
        locals_=x[:, :, :, :4, :4],
        index=torch.arange(4),
        labels=torch.arange(4),
        boxes=torch.rand(4, 4, 4),
        draws=torch.rand(4, 4, 11),
        extra={"large": x},
    )
    normalize = Normalize()
    found = normalize.crops(crops, torch.float64)
    assert torch.equal(found.globals_, normalize(x, torch.float64))
    assert found.locals_ is not None
    assert torch.equal(found.locals_, normalize(x[:, :, :, :4, :4], torch.float64))
    assert torch.equal(found.extra["large"], found.globals_)
    for name in ("index", "labels", "boxes", "draws"):
        assert getattr(found, name) is getattr(crops, name)
    assert normalize.crops(crops._replace(locals_=None)).locals_ is None


def test_checkpoints_do_not_hold_it() -> None:
    """The constants are the configuration's, not the run's."""
    assert not Normalize().state_dict()


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5, 0.5)), ((0.5,), (0.0,))])
def test_impossible_constants_are_refused(mean: tuple[float], std: tuple[float]) -> None:
    """A channel without its pair, or a division by zero."""
    with pytest.raises(UserError, match="std"):
        Normalize(mean, std)
