"""What is drawn of each crop: boxes and frequencies as published, keyed by epoch and sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st

from dino_lite.contracts import UserError
from dino_lite.data import crops
from dino_lite.data.crops import COLUMNS, MultiCrop, Photometric

ALWAYS = Photometric(flip_prob=1, jitter_prob=1, gray_prob=1, blur_prob=1, solarize_prob=1)
NEVER = Photometric(flip_prob=0, jitter_prob=0, gray_prob=0, blur_prob=0, solarize_prob=0)


def draw(crop: MultiCrop, n: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and parameters of n images of one size in epoch 0."""
    sides = np.full(n, height), np.full(n, width)
    return crop.draw(np.zeros(n, int), np.arange(n), *sides)


# ------------------------------------------------------------------------------------------ draw


@given(height=st.integers(1, 700), width=st.integers(1, 700), seed=st.integers(0, 5))
def test_boxes_lie_in_the_image(height: int, width: int, seed: int) -> None:
    """For any size of image, also those in which no box of the wanted shape has room."""
    boxes, _ = draw(MultiCrop(32, 16, 3, seed=seed), 20, height, width)
    top, left, high, wide = boxes.reshape(-1, 4).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (high >= 1).all()
    assert (wide >= 1).all()
    assert (top + high <= height).all()
    assert (left + wide <= width).all()


def test_boxes_have_the_area_and_shape_asked_for() -> None:
    """Local and global crops keep to their own scale and to the aspect ratio, up to rounding."""
    crop = MultiCrop(32, 16, 1, global_scale=(0.5, 0.8), local_scale=(0.1, 0.2), ratio=(0.8, 1.5))
    boxes, _ = draw(crop, 2000, 300, 400)
    area = boxes[..., 2] * boxes[..., 3] / (300 * 400)
    aspect = boxes[..., 3] / boxes[..., 2]
    for s, (low, high) in enumerate([(0.5, 0.8), (0.5, 0.8), (0.1, 0.2)]):
        assert low - 0.005 < area[s].min() < low + 0.02
        assert high - 0.02 < area[s].max() < high + 0.005
        assert 0.79 < aspect[s].min() < 0.85
        assert 1.4 < aspect[s].max() < 1.52


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(400, 10, [193, 0, 13, 10]), (10, 400, [0, 193, 10, 13])],
    ids=["tall", "wide"],
)
def test_where_no_box_fits_the_center_is_taken(height: int, width: int, box: list[int]) -> None:
    """The longest centered box whose aspect ratio is allowed."""
    boxes, _ = draw(MultiCrop(32, 16, 0, global_scale=(0.9, 1.0)), 5, height, width)
    assert (boxes == box).all()


def test_draws_depend_on_nothing_but_the_key() -> None:
    """Neither the companions in the batch nor the number of local crops changes a crop."""
    many = MultiCrop(32, 16, 6, seed=3)
    epochs, indices = np.array([4, 4, 5]), np.array([8, 2, 8])
    heights, widths = np.array([50, 60, 70]), np.array([90, 80, 70])
    boxes, drawn = many.draw(epochs, indices, heights, widths)
    for i in range(3):
        one = slice(i, i + 1)
        alone = MultiCrop(32, 16, 1, seed=3).draw(
            epochs[one], indices[one], heights[one], widths[one]
        )
        assert (alone[0] == boxes[:3, one]).all()
        assert (alone[1] == drawn[:3, one]).all()
    other = MultiCrop(32, 16, 6, seed=4).draw(epochs, indices, heights, widths)[0]
    assert (other != boxes).any(-1).all()
    assert (boxes[:, 0] != boxes[:, 2]).any()  # the same image in the next epoch


def test_stored_draws_never_change() -> None:
    """A run that a later version resumes must see the same crops."""
    boxes, drawn = MultiCrop(32, 16, 1, seed=9).draw(
        np.array([1]), np.array([5]), np.array([120]), np.array([200])
    )
    assert boxes[:, 0].tolist() == [[3, 2, 112, 94], [7, 27, 89, 116], [9, 2, 77, 76]]
    np.testing.assert_allclose(
        drawn[:, 0, :9],
        [
            [0.0, 0.703761, 0.925925, 0.850244, 0.072439, 8.0, 1.0, 0.290572, 0.0],
            [1.0, 1.335316, 0.905578, 1.016519, 0.000849, 21.0, 0.0, 0.0, 0.0],
            [0.0, 1.164697, 0.978068, 0.927587, 0.048369, 5.0, 0.0, 1.497898, 0.0],
        ],
        rtol=0,
        atol=1e-6,
    )


def test_operations_happen_as_often_as_asked() -> None:
    """Each operation of each kind of crop within 5 sigma of its probability, order included."""
    kinds = [
        Photometric(0.3, 0.7, gray_prob=0.6, blur_prob=0.9, solarize_prob=0.2),
        Photometric(0.9, 0.2, gray_prob=0.1, blur_prob=0.4, solarize_prob=0.5),
        Photometric(0.5, 0.8, gray_prob=0.3, blur_prob=0.1, solarize_prob=0.7),
    ]
    n = 4000
    multi_crop = MultiCrop(32, 16, 1, global_1=kinds[0], global_2=kinds[1], local=kinds[2])
    _, drawn = draw(multi_crop, n, 64, 64)
    for kind, rows in zip(kinds, drawn, strict=True):
        values = dict(zip(COLUMNS, rows.T, strict=True))
        happened = {name: values[name] > 0 for name in ("flip", "gray", "blur", "solarize")}
        happened["jitter"] = values["brightness"] != 1
        for name, events in happened.items():
            p = getattr(kind, f"{name}_prob")
            assert abs(events.mean() - p) < 5 * np.sqrt(p * (1 - p) / n), name
        orders = np.bincount(values["order"][happened["jitter"]].astype(int), minlength=24)
        share = orders / orders.sum()
        assert np.abs(share - 1 / 24).max() < 5 * np.sqrt(23 / 24**2 / orders.sum())


def test_factors_fill_their_range() -> None:
    """1 - strength to 1 + strength, hue around 0, blur radius as given."""
    spec = ALWAYS._replace(
        brightness=0.5, contrast=0.1, saturation=0.3, hue=0.2, blur_radius=(1.0, 3.0)
    )
    _, drawn = draw(MultiCrop(32, 16, 0, global_1=spec), 4000, 64, 64)
    low, high = drawn[0].min(0), drawn[0].max(0)
    wanted = [(0.5, 1.5), (0.9, 1.1), (0.7, 1.3), (-0.2, 0.2), (1, 3)]
    for column, (first, last) in zip([1, 2, 3, 4, 7], wanted, strict=True):
        assert first <= low[column] < first + 0.01 * (last - first)
        assert last - 0.01 * (last - first) < high[column] <= np.float32(last)


def test_probabilities_of_zero_and_one_are_certain() -> None:
    """Nothing at all, or everything every time."""
    multi_crop = MultiCrop(32, 16, 0, global_1=NEVER, global_2=ALWAYS)
    _, drawn = draw(multi_crop, 500, 64, 64)
    assert (drawn[0] == list(COLUMNS.values())).all()
    assert (drawn[1][:, [0, 6, 8]] == 1).all()
    assert (drawn[1][:, 1:5] != crops.NO_JITTER).any(1).all()
    assert (drawn[1][:, 7] > 0).all()


def test_no_box_needs_more_pixels_than_stated() -> None:
    """An image of `min_pixels` gives each crop as many pixels as it has, or more."""
    multi_crop = MultiCrop(32, 16, 4)
    side = int(np.ceil(multi_crop.min_pixels**0.5))
    boxes, _ = draw(multi_crop, 2000, side, side)
    assert (boxes[..., 2:].min((1, 2)) >= np.array(multi_crop.sizes) - 1).all()
    assert boxes[2:, :, 2:].min() < 16 * 1.1  # and not many more
    larger = MultiCrop(32, 16, 4, gram_size=64)
    assert larger.min_pixels == pytest.approx(4 * MultiCrop(32, 16, 0).min_pixels, rel=1e-3)
    assert MultiCrop(32, 16, 4, gram_size=8).min_pixels == multi_crop.min_pixels


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"global_size": 0}, "global_size"),
        ({"local_size": 0}, "local_size"),
        ({"num_local": -1}, "num_local"),
        ({"gram_size": 0}, "gram_size"),
        ({"blur_kernel": 8}, "blur_kernel"),
        ({"blur_kernel": -1}, "blur_kernel"),
        ({"global_scale": (0.5, 0.2)}, "global_scale"),
        ({"global_scale": (0.5, 1.2)}, "global_scale"),
        ({"local_scale": (0.0, 0.2)}, "local_scale"),
        ({"local_scale": (0.1, 0.2, 0.3)}, "local_scale"),
        ({"ratio": (-1.0, 1.0)}, "ratio"),
        ({"local": Photometric(flip_prob=1.5)}, "local.flip_prob"),
        ({"global_1": Photometric(blur_prob=-0.1)}, "global_1.blur_prob"),
        ({"global_2": Photometric(hue=0.6)}, "global_2.hue"),
        ({"global_2": Photometric(brightness=-1)}, "global_2.brightness"),
        ({"local": Photometric(blur_radius=(2.0, 1.0))}, "local.blur_radius"),
    ],
)
def test_impossible_values_are_refused_by_name(values: dict[str, object], key: str) -> None:
    """One sentence that names the key."""
    with pytest.raises(UserError, match=f"MultiCrop.{key}="):
        MultiCrop(**{"global_size": 32, "local_size": 16, "num_local": 2, **values})


def test_the_config_is_the_published_recipe(root: Path) -> None:
    """conf/augment/dino.yaml builds the defaults of the code, which golden cases are held to."""
    text = (root / "conf/augment/dino.yaml").read_text(encoding="utf-8")
    sizes = {"global_size": 32, "local_size": 16, "num_local": 2, "where": "worker", "seed": 0}
    node = {**yaml.safe_load(text), **sizes}
    scales = {"global_scale": [0.4, 1.0], "local_scale": [0.05, 0.4]}  # settled for a ViT
    assert {key: node[key] for key in scales} == dict.fromkeys(scales, "auto")
    node |= scales
    for kind in ("global_1", "global_2", "local"):  # settled by the plan, in proportion to the size
        assert node[kind]["blur_radius"] == "auto"
        node[kind]["blur_radius"] = [0.1, 2.0]
    built = instantiate(node, _convert_="all")
    plain = MultiCrop(**sizes)
    assert [tuple(kind) for kind in built.kinds] == [
        tuple(kind._replace(blur_radius=list(kind.blur_radius))) for kind in plain.kinds
    ]
    assert built.ratio == plain.ratio
    assert np.array_equal(built.scales, plain.scales)
