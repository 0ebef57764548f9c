"""The evaluation's view of a data set: deterministic, in order, honest about what is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data.clean import CleanData, by_channel, clean
from dino_lite.data.photometric import Normalize
from dino_lite.data.preprocessing import Preprocessing

CPU = torch.device("cpu")
# Multiprocessing's, from Python 3.12 on, where libraries have started threads before.
fork_is_fine = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


class Pictures(Source):
    """A source of 8 x 8 images, of which some cannot be read."""

    classes = ("a", "b")

    def __init__(self, n: int, labels: bool = True, bad: tuple[int, ...] = ()) -> None:
        self.n, self.bad = n, bad
        self.labels = np.arange(n) % 2 if labels else None

    def __len__(self) -> int:
        return self.n

    def read(self, index: int, min_pixels: int | None = None) -> np.ndarray:
        if index in self.bad:
            raise OSError("torn in two")
        return np.asarray(picture(8, 8, index))

    def name(self, index: int) -> str:
        return f"{index}.png"

    def digest(self) -> str:
        return "0"


@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 40))
def test_clean_is_the_published_protocol_at_any_size(height: int, width: int, size: int) -> None:
    """Shorter side to 256/224 of the size, then the center: as torchvision's two transforms."""
    image = picture(height, width)
    pixels = np.asarray(image)
    resize = Resize(round(size * 256 / 224), InterpolationMode.BICUBIC)
    wanted = Compose([resize, CenterCrop(size)])(image)
    if (height, width) != (size, size):
        assert np.array_equal(clean(pixels, Preprocessing((size, size))), np.asarray(wanted))


@given(height=st.integers(1, 60), width=st.integers(1, 60), channels=st.sampled_from([1, 2, 4, 7]))
def test_any_channels_are_cleaned_as_those_of_rgb_are(
    height: int, width: int, channels: int
) -> None:
    """Channel i of many is the red, green or blue of the same numbers, to the last bit."""
    rng = np.random.default_rng(channels)
    many = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    found = clean(many, Preprocessing((24, 24)))
    assert (found.shape, found.dtype) == ((24, 24, channels), np.uint8)
    for i in range(channels):
        rgb = np.ascontiguousarray(many[..., [(i + k) % channels for k in range(3)]])
        assert np.array_equal(found[..., i], clean(rgb, Preprocessing((24, 24)))[..., 0])


def test_by_channel_gives_each_channel_to_pil_alone() -> None:
    """Three at once as RGB; the order stays."""
    rng = np.random.default_rng(0)
    for channels in (1, 2, 3, 5):
        image = rng.integers(0, 256, (5, 4, channels), dtype=np.uint8)
        turned = by_channel(image, lambda part: part.transpose(Image.Transpose.ROTATE_90))
        assert np.array_equal(turned, np.rot90(image))


def test_an_image_of_the_right_size_is_not_touched() -> None:
    """CIFAR-10 evaluated at 32 pixels is CIFAR-10."""
    image = np.asarray(picture(32, 32))
    assert np.array_equal(clean(image, Preprocessing((32, 32))), image)


@fork_is_fine
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [4, 5, 100])
def test_every_image_comes_once_and_in_order(num_workers: int, batch_size: int) -> None:
    """Whatever the batch size and the number of workers; the last batch is smaller."""
    source = Pictures(10)
    data = CleanData(
        Splits(source, None, "pictures"), Preprocessing((8, 8)), batch_size, num_workers
    )
    images, labels = zip(*data.batches(source, CPU, torch.float64), strict=True)
    assert len(images) == -(-10 // batch_size)
    assert torch.cat(labels).tolist() == source.labels.tolist()
    pixels = np.stack([np.asarray(source.read(i)) for i in range(10)])
    wanted = Normalize()(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.float64)
    assert torch.equal(torch.cat(images), wanted)


def test_labels_are_minus_one_where_there_are_none() -> None:
    """And integers all the same."""
    source = Pictures(3, labels=False)
    data = CleanData(Splits(source, None, "pictures"), Preprocessing((8, 8)), 2)
    labels = torch.cat([labels for _, labels in data.batches(source, CPU)])
    assert labels.tolist() == [-1, -1, -1]
    assert labels.dtype == torch.int64


def test_unreadable_images_are_left_out_and_noted() -> None:
    """Labels stay beside their images; a batch without any is not yielded."""
    source = Pictures(8, bad=(1, 4, 5))
    data = CleanData(Splits(source, None, "pictures"), Preprocessing((8, 8)), batch_size=2)
    batches = list(data.batches(source, CPU))
    assert [len(images) for images, _ in batches] == [1, 2, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1, 0, 1]
    assert data.bad == {f"{i}.png": "torn in two" for i in (1, 4, 5)}


@pytest.mark.parametrize("values", [(0, 4, 0), (8, 0, 0), (8, 4, -1)])
def test_impossible_values_are_refused(values: tuple[int, int, int]) -> None:
    """Size, batch size, number of workers."""
    size, batch_size, num_workers = values
    with pytest.raises(UserError, match="impossible"):
        CleanData(
            Splits(Pictures(1), None, "x"), Preprocessing((size, size)), batch_size, num_workers
        )
