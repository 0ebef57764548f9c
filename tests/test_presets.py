"""Augmentation presets change what they say, and hold what they promise."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dino_lite.config import compose, config_dir, instantiate, leaves
from dino_lite.data import exact
from dino_lite.data.crops import COLUMNS, Drawn, MultiCrop, Photometric
from dino_lite.planning.plan import plan
from test_conf import facts

PRESETS = ("aerial", "dinov2", "document", "grayscale", "medical")
FACTS = facts(channels=3, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
KINDS = ("global_1", "global_2", "local")
SIZES = ("augment.global_size=32", "augment.local_size=16", "augment.num_local=2")


def build(name: str, *overrides: str) -> MultiCrop:
    """The multi-crop of `augment=name` as a run has it, in small."""
    planned = plan(compose("pretrain", [f"augment={name}", *SIZES, *overrides]), FACTS)
    multi_crop: MultiCrop = instantiate(planned.config["augment"])
    return multi_crop


def draw(multi_crop: MultiCrop, num: int = 4000, height: int = 60, width: int = 80) -> Drawn:
    """Crops of images 0 to num of one size."""
    sides = np.full(num, height), np.full(num, width)
    return multi_crop.draw(np.zeros(num, int), np.arange(num), *sides)


def columns(drawn: Drawn) -> dict[str, np.ndarray]:
    """Each of COLUMNS over all crops of all images."""
    return dict(zip(COLUMNS, drawn.params.reshape(-1, len(COLUMNS)).T, strict=True))


def noise(height: int, width: int, channels: int = 3, num: int = 4) -> list[np.ndarray]:
    """Images in which every pixel differs."""
    shape = (num, height, width, channels)
    return list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def make(multi_crop: MultiCrop, images: list[np.ndarray]) -> list[np.ndarray]:
    """The pixels of all crops of all images."""
    height, width, channels = images[0].shape
    drawn = draw(multi_crop, len(images), height, width)
    crops = [np.empty((len(images), s, s, channels), np.uint8) for s in multi_crop.sizes]
    exact.make_crops(images, drawn, crops)
    return crops


def params(**values: float) -> list[float]:
    """COLUMNS, all neutral but those given."""
    return [float(value) for value in (COLUMNS | values).values()]


def square(flip: float, vertical: float, turns: float, pixels: np.ndarray) -> np.ndarray:
    """The oracle: mirrored, then upside down, then turned counter-clockwise."""
    pixels = np.fliplr(pixels) if flip else pixels
    pixels = np.flipud(pixels) if vertical else pixels
    return np.rot90(pixels, int(turns))


# --------------------------------------------------------------------------------- what files say


def test_every_preset_is_tested_here() -> None:
    """A new file in conf/augment comes with the property it promises."""
    assert {path.stem for path in (config_dir() / "augment").glob("*.yaml")} == {"dino", *PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_changes_what_its_file_says_and_nothing_else(name: str) -> None:
    """Each key of the file is one of dino's, arrives, and differs for at least one kind of crop."""
    text = (config_dir() / "augment" / f"{name}.yaml").read_text(encoding="utf-8")
    said = yaml.safe_load(text)
    assert said.pop("defaults") == ["dino", "_self_"]
    written = dict(leaves(said))
    dino = dict(leaves(compose("pretrain", [])["augment"]))
    found = dict(leaves(compose("pretrain", [f"augment={name}"])["augment"]))
    assert found == dino | written
    assert written.keys() <= dino.keys()
    for key in written:
        last = key.rpartition(".")[2]
        alike = [key] if last == key else [f"{kind}.{last}" for kind in KINDS]
        assert any(found[other] != dino[other] for other in alike), key


@pytest.mark.parametrize("name", PRESETS)
def test_what_the_plan_settles_of_dino_it_settles_of_presets(name: str) -> None:
    """Sizes and the radius of the blur follow the data, also where there is little blur; scales
    where the file says nothing of them.
    """
    text = (config_dir() / "augment" / f"{name}.yaml").read_text(encoding="utf-8")
    automatic = {f"{kind}.blur_radius" for kind in KINDS}
    automatic |= {"global_size", "local_size", "num_local", "where"}
    automatic |= {"global_scale", "local_scale"} - yaml.safe_load(text).keys()
    composed = compose("pretrain", [f"augment={name}"])
    assert {key for key, value in leaves(composed["augment"]) if value == "auto"} == automatic
    settled, usual = (
        dict(leaves(plan(config, FACTS).config["augment"]))
        for config in (composed, compose("pretrain", []))
    )
    assert {key: settled[key] for key in automatic} == {key: usual[key] for key in automatic}


# ------------------------------------------------------------------------------ what they promise


def test_aerial_lays_the_square_in_all_eight_ways_alike() -> None:
    """Each kind of crop, in its pixels; each of the eight within 5 sigma of an eighth."""
    image = noise(5, 5)[0]
    ways = [square(flip, 0, turns, image).tobytes() for flip in (0, 1) for turns in range(4)]
    assert len(set(ways)) == 8
    drawn, num = draw(build("aerial")), 4000
    for rows in drawn.params:
        flips = [dict(zip(COLUMNS, row, strict=True)) for row in rows.tolist()]
        made = [
            exact.augment(
                Image.fromarray(image),
                params(**{key: row[key] for key in ("flip", "vertical", "turns")}),
            )
            for row in flips
        ]
        counts = np.bincount([ways.index(pixels.tobytes()) for pixels in made], minlength=8)
        assert np.abs(counts / num - 1 / 8).max() < 5 * np.sqrt(7 / 64 / num)


def test_aerial_keeps_hues() -> None:
    """No other hue, no gray, no negative; never a crop under a tenth of the image."""
    drawn = draw(build("aerial"))
    found = columns(drawn)
    assert not np.concatenate([found[name] for name in ("hue", "gray", "solarize")]).any()
    for name, strength in (("brightness", 0.2), ("contrast", 0.2), ("saturation", 0.1)):
        assert 0.95 * strength < np.abs(found[name] - 1).max() <= np.float32(strength) + 1e-6
    area = drawn.boxes[..., 2] * drawn.boxes[..., 3] / (60 * 80)
    assert area.min() > 0.09  # boxes are whole pixels


def test_dinov2_divides_the_areas_at_a_third() -> None:
    """Global crops from 0.32 of the image on, local ones up to it; the blur is DINO's."""
    drawn = draw(build("dinov2"))
    area = drawn.boxes[..., 2] * drawn.boxes[..., 3] / (60 * 80)
    assert 0.31 < area[:2].min() < 0.34
    assert 0.30 < area[2:].max() < 0.33
    blurred = (dict(zip(COLUMNS, drawn.params.T, strict=True))["blur"] > 0).mean(0)
    assert np.abs(blurred - [1, 0.1, 0.5, 0.5]).max() < 0.05


def test_medical_leaves_the_meaning_of_gray_levels() -> None:
    """Brighter and darker a little, in order: what is brighter than its neighbor stays so."""
    found = columns(draw(build("medical")))
    for name in ("hue", "gray", "solarize", "vertical", "turns"):
        assert not found[name].any(), name
    assert (found["saturation"] == 1).all()
    assert 0.3 < found["flip"].mean() < 0.7
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(4, 0)
    never = [f"augment.{kind}.{key}=0" for kind in KINDS for key in ("flip_prob", "blur_prob")]
    for crops in make(build("medical", *never), [ramp] * 20):
        assert (np.diff(crops.astype(int), axis=2) >= 0).all()
        assert crops.std() > 0


def test_medical_is_turned_where_that_is_asked_for() -> None:
    """The keys that its file names for tissue: all four directions."""
    wanted = [f"augment.{kind}.quarter_turns=true" for kind in KINDS]
    turns = columns(draw(build("medical", *wanted)))["turns"]
    assert np.abs(np.bincount(turns.astype(int), minlength=4) / turns.size - 0.25).max() < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_grayscale_makes_the_crops_of_dino_on_gray_images(channels: int) -> None:
    """What it leaves out has no effect there: the same to the last bit, and gray stays gray."""
    images = [image.repeat(channels, axis=2) for image in noise(60, 80, channels=1, num=30)]
    dino, gray = build("dino"), build("grayscale")
    omitted = columns(draw(dino, 30))
    assert (omitted["hue"] != 0).any()
    assert omitted["gray"].any()
    for ours, theirs in zip(make(gray, images), make(dino, images), strict=True):
        assert np.array_equal(ours, theirs)
        assert (ours == ours[..., :1]).all()


def test_grayscale_never_touches_color() -> None:
    """Hue, saturation and gray are off whatever image comes along."""
    found = columns(draw(build("grayscale")))
    assert (found["saturation"] == 1).all()
    assert not found["hue"].any()
    assert not found["gray"].any()
    assert found["solarize"].any()
    assert (found["brightness"] != 1).any()


def test_document_keeps_text_as_it_is_read() -> None:
    """With the light left alone, a crop is the piece of the page, neither mirrored nor turned."""
    found = columns(draw(build("document")))
    for name in ("flip", "vertical", "turns", "hue", "solarize"):
        assert not found[name].any(), name
    light = ("jitter_prob", "blur_prob", "gray_prob")
    multi_crop = build("document", *(f"augment.{kind}.{key}=0" for kind in KINDS for key in light))
    pages = noise(141, 100)
    boxes = draw(multi_crop, len(pages), 141, 100).boxes
    for s, crops in enumerate(make(multi_crop, pages)):
        for crop, page, (top, left, height, width) in zip(crops, pages, boxes[s], strict=True):
            piece = Image.fromarray(page[top : top + height, left : left + width])
            side = multi_crop.sizes[s]
            resized = piece.resize((side, side), Image.Resampling.BICUBIC)
            assert np.array_equal(crop, np.asarray(resized))


def test_document_keeps_the_shape_of_letters() -> None:
    """Crops of a page are square to 10 %, the centered ones where none fits as well."""
    for height, width in ((1414, 1000), (1000, 1414), (3000, 1000)):
        boxes = draw(build("document"), 2000, height, width).boxes
        aspect = boxes[..., 3] / boxes[..., 2]
        assert aspect.min() > 0.895
        assert aspect.max() < 1.105


# --------------------------------------------------------------------------------- flips and turns


@pytest.mark.parametrize(("flip", "vertical", "turns"), [*product((0, 1), (0, 1), range(4))])
def test_flips_and_turns_are_numpys_in_this_order(flip: int, vertical: int, turns: int) -> None:
    """fliplr, flipud, then rot90, of which the order matters."""
    image = noise(7, 7)[0]
    found = exact.augment(Image.fromarray(image), params(flip=flip, vertical=vertical, turns=turns))
    assert np.array_equal(found, square(flip, vertical, turns, image))


def test_turning_changes_nothing_else_of_a_crop() -> None:
    """Boxes and all other parameters are those of the same run without it, for turned crops and
    for the other kinds; a crop that happens to stay upright has the same pixels.
    """
    turned = Photometric(vertical_prob=0.5, quarter_turns=True)
    plain = MultiCrop(32, 16, 2, local=Photometric())
    some = MultiCrop(32, 16, 2, local=turned)
    ours, theirs = draw(plain, 50), draw(some, 50)
    assert np.array_equal(ours.boxes, theirs.boxes)
    assert np.array_equal(ours.params[..., :-2], theirs.params[..., :-2])
    assert not ours.params[..., -2:].any()
    assert not theirs.params[:2, :, -2:].any()
    upright = ~theirs.params[..., -2:].any(-1)
    assert 0 < upright[2:].mean() < 0.5
    images = noise(60, 80, num=50)
    for s, (mine, other) in enumerate(zip(make(plain, images), make(some, images), strict=True)):
        same = (mine == other).all((1, 2, 3))
        assert np.array_equal(same, upright[s])


def test_turns_depend_on_nothing_but_the_key() -> None:
    """Neither the batch nor the number of local crops changes them; seed and epoch do."""
    kind = Photometric(vertical_prob=0.5, quarter_turns=True)

    def turns(num_local: int, seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
        crop = MultiCrop(32, 16, num_local, global_1=kind, global_2=kind, local=kind, seed=seed)
        sides = np.full(len(indices), 40)
        return crop.draw(np.full(len(indices), epoch), indices, sides, sides).params[..., -2:]

    many = turns(6, 3, 4, np.arange(64))
    assert np.array_equal(many[:3, 20:21], turns(1, 3, 4, np.array([20])))
    assert (many != turns(6, 5, 4, np.arange(64))).any()
    assert (many != turns(6, 3, 5, np.arange(64))).any()
    assert (many[0] != many[1]).any()


# ------------------------------------------------------------------------------------------ sheets


@pytest.mark.slow
def test_a_sheet_is_drawn_of_every_preset(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script writes a PNG for each, from the embedded set and from a folder."""
    monkeypatch.syspath_prepend(root / "scripts")
    import draw_presets

    Image.fromarray(noise(50, 40)[0]).save(tmp_path / "photo.png")
    for folder in ([], [str(tmp_path)]):
        out = tmp_path / f"sheets{len(folder)}"
        assert draw_presets.main([*folder, "--num-images", "2", "--out", str(out)]) == 0
        assert {path.stem for path in out.iterdir()} == {"dino", *PRESETS}
    assert draw_presets.main([str(tmp_path / "nowhere")]) == 2
