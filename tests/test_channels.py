"""Images of 1, 3 or n channels, from the file to the exported backbone and its measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dino_lite import load_backbone
from dino_lite.commands.evaluate import run_evaluate
from dino_lite.commands.export import run_export
from dino_lite.config import Config, compose, get, load
from dino_lite.data import resample
from dino_lite.data.clean import CleanData
from dino_lite.data.crops import MultiCrop
from dino_lite.data.facts import read_facts
from dino_lite.data.folder import open_folder
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.shapes import open_shapes
from dino_lite.formats.safetensors import read_config
from dino_lite.runs.pretraining import run_pretrain
from images import sentence
from tiny import WITH_PICTURES, photos, pixel_features, tiny, train

NUM = 24
FIVE = ("data.channels=5", "baselines=true", "loader.num_workers=1", WITH_PICTURES)


def arrays(channels: int, side: int = 20) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Noise around the color of one of two classes; channels differ in mean and spread."""
    rng, labels = np.random.default_rng(channels), np.arange(NUM) % 2
    means = rng.uniform(60, 190, (2, channels))[labels][:, None, None]
    spread = np.linspace(10, 40, channels)
    pixels = means + spread * rng.standard_normal((NUM, side, side + 4, channels))
    return pixels.clip(0, 255).astype(np.uint8), labels


def scenes(folder: Path, channels: int) -> Path:
    """A folder of .npy files in two classes."""
    for i, (image, label) in enumerate(zip(*arrays(channels), strict=True)):
        path = folder / f"class{label}" / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, image)
    return folder


def check_run(run: Path, channels: int) -> Config:
    """What a run of so many channels leaves; its configuration."""
    config = load(run / "config.yaml")
    assert get(config, "backbone.in_chans") == channels
    assert len(get(config, "normalize.mean")) == len(get(config, "normalize.std")) == channels
    for picture in ("crops.png", "attention.png", "neighbors.png"):
        with Image.open(run / picture) as image:
            assert np.asarray(image).std() > 0
    return config


def check_use(run: Path, channels: int) -> None:
    """It is measured and exported on its own data, and the export takes such images."""
    runs_dir = run.parent
    measured = run_evaluate(compose("evaluate", [f"checkpoint={run}", f"runs_dir={runs_dir}"]))
    assert 0 <= measured["knn"]["top1"] <= 100
    assert measured["knn"]["unreadable"] == 0
    written = run_export(compose("export", [f"checkpoint={run}", f"runs_dir={runs_dir}"]))
    folder = written["safetensors"]["directory"]
    about, config = read_config(folder), load(run / "config.yaml")
    assert about["in_chans"] == channels
    assert (about["mean"], about["std"]) == (
        config["normalize"]["mean"],
        config["normalize"]["std"],
    )
    assert load_backbone(folder)(torch.randn(1, channels, 16, 16)).cls.shape == (1, 32)


@pytest.fixture(scope="module")
def gray_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded set as luma."""
    return train(
        tmp_path_factory.mktemp("runs"), "data.channels=1", "baselines=true", WITH_PICTURES
    )


@pytest.fixture(scope="module")
def five_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of arrays with five channels."""
    root = scenes(tmp_path_factory.mktemp("scenes"), 5)
    runs_dir = tmp_path_factory.mktemp("runs")
    return train(runs_dir, f"data.root={root}", *FIVE, data="folder")


@pytest.mark.slow
def test_one_channel_from_the_file_to_the_export(gray_run: Path) -> None:
    """Luma is normalized as it was measured."""
    config = check_run(gray_run, 1)
    assert 0.2 < get(config, "normalize.mean")[0] < 0.8
    check_use(gray_run, 1)


@pytest.mark.slow
def test_five_channels_from_the_file_to_the_export(five_run: Path) -> None:
    """Each by its own mean and spread, which those of all the pixels are."""
    config = check_run(five_run, 5)
    pixels = arrays(5)[0] / 255
    np.testing.assert_allclose(get(config, "normalize.mean"), pixels.mean((0, 1, 2)), atol=1e-3)
    np.testing.assert_allclose(get(config, "normalize.std"), pixels.std((0, 1, 2)), atol=1e-3)
    check_use(five_run, 5)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_an_archive_of_any_channels_trains(channels: int, tmp_path: Path) -> None:
    """By the path that is settled for so many: PIL for one, whole on the device for others."""
    pixels, labels = arrays(channels)
    np.savez(tmp_path / "a.npz", x_train=pixels, y_train=labels)
    own = (f"data.channels={channels}", f"data.root={tmp_path / 'a.npz'}")
    check_run(train(tmp_path, *own, WITH_PICTURES, data="npz"), channels)


@pytest.mark.slow
def test_a_backbone_of_rgb_is_the_start_of_one_of_five(five_run: Path, tmp_path: Path) -> None:
    """Its export is given as backbone.pretrained; at rate 0 the adapted weights are the result."""
    rgb = train(tmp_path, "trainer.max_steps=2", "name=rgb")
    out = tmp_path / "rgb backbone"
    run_export(compose("export", [f"checkpoint={rgb}", f"out={out}", f"runs_dir={tmp_path}"]))
    root = get(load(five_run / "config.yaml"), "data.root")
    still = ("optim.rate=0", "trainer.max_steps=2", "method.momentum.base=1")
    start = (f"backbone.pretrained={out}", f"data.root={root}", FIVE[0], *still, "name=five")
    five = train(tmp_path, *start, data="folder")
    run_export(compose("export", [f"checkpoint={five}", f"runs_dir={tmp_path}"]))
    before = load_file(out / "model.safetensors")["patch_embed.proj.weight"]
    after = load_file(five / "export" / "safetensors" / "model.safetensors")
    wanted = before[:, [0, 1, 2, 0, 1]] * 3 / 5
    torch.testing.assert_close(after["patch_embed.proj.weight"], wanted)


@pytest.mark.slow
def test_data_of_a_users_own_come_in_the_backbones_channels(
    gray_run: Path, five_run: Path, tmp_path: Path
) -> None:
    """Nobody has to say data.channels again; what cannot be had is a sentence before it begins."""
    names = [f"class{i % 2}/{i}.png" for i in range(8)]
    asked = ("data=folder", f"data.root={photos(tmp_path / 'photos', names)}")

    def config(run: Path, *more: str) -> Config:
        where = (f"checkpoint={run}", f"runs_dir={tmp_path}", "image_size=16")
        return compose("evaluate", [*where, *asked, *more])

    assert run_evaluate(config(gray_run))["knn"]["unreadable"] == 0
    told = sentence(run_evaluate, config(five_run))
    assert "None of the 8 images can be read" in told
    assert "has 3 channels, not data.channels=5" in told
    told = sentence(run_evaluate, config(five_run, "data.channels=1"))
    assert "have 1 channel, but the backbone takes 5" in told
    told = sentence(run_export, compose("export", [f"checkpoint={five_run}", *asked]))
    assert "not data.channels=5" in told


def test_channels_that_do_not_fit_are_a_sentence(tmp_path: Path) -> None:
    """Said before anything is written."""
    root = scenes(tmp_path / "scenes", 5)
    runs_dir = tmp_path / "runs"
    told = sentence(run_pretrain, tiny(runs_dir, f"data.root={root}", data="folder"))
    assert "has 5 channels, not data.channels=3" in told
    told = sentence(run_pretrain, tiny(runs_dir, "data.channels=4"))
    assert "the embedded shapes have 3" in told
    told = sentence(run_pretrain, tiny(runs_dir, "data.channels=1", "backbone.in_chans=3"))
    assert "the images have 1 channel;" in told
    five = (f"data.root={root}", "data.channels=5", "augment.where=worker")
    told = sentence(run_pretrain, tiny(runs_dir, *five, data="folder"))
    assert "PIL does not support 5 channels" in told
    assert not runs_dir.exists()


def test_raw_pixels_of_any_channels_are_a_baseline(tmp_path: Path) -> None:
    """As many numbers as pixels times channels, whatever the normalization."""
    splits = open_folder(scenes(tmp_path, 5), channels=5)
    ours, other = (
        pixel_features(CleanData(splits, Preprocessing((16, 16), *values), 8))[0].features
        for values in (([0.5] * 5, [0.1, 0.2, 0.3, 0.4, 0.5]), ([0.0] * 5, [1.0] * 5))
    )
    assert ours.shape == (NUM, 32 * 32 * 5)
    torch.testing.assert_close(ours, other, atol=1e-5, rtol=0)


def test_facts_of_large_images_are_those_of_their_parts(tmp_path: Path) -> None:
    """Mean and spread of a channel are a plain loop's, though only some of the rows are read."""
    y, x = np.mgrid[:900, :1100]
    image = np.stack([y % 251, x % 241, (x + y) % 239, np.full_like(x, 7)], -1).astype(np.uint8)
    np.save(tmp_path / "a.npy", image)
    facts = read_facts(open_folder(tmp_path, channels=4))
    assert (facts.height, facts.width, facts.channels) == (900, 1100, 4)
    for channel in range(4):
        values = image[..., channel].astype(np.float64) / 255
        assert facts.mean[channel] == pytest.approx(values.mean(), abs=0.01)
        assert facts.std[channel] == pytest.approx(values.std(), abs=0.01)


@pytest.mark.parametrize("channels", [2, 5])
def test_crops_of_many_channels_are_the_crops_of_each(channels: int) -> None:
    """Cut out and resized, no channel knows of another."""
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels), np.uint8)
    multi_crop = MultiCrop(16, 8, 2)
    drawn = multi_crop.draw(*(np.array([number]) for number in (0, 3, 40, 50)))

    def crops(pixels: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        out = [np.empty((1, size, size, pixels.shape[2]), np.uint8) for size in multi_crop.sizes]
        resample.make_crops([pixels], drawn, out)
        return out

    each = [crops(np.ascontiguousarray(image[..., [c]])) for c in range(channels)]
    for whole, *parts in zip(crops(image), *each, strict=True):
        assert np.array_equal(whole, np.concatenate(parts, axis=-1))


def test_the_embedded_set_as_luma_is_the_luma_of_its_colors() -> None:
    """And has no other channels."""
    rgb, bright = (open_shapes(20, 0, channels=channels).train for channels in (3, 1))
    assert bright.read(7).shape == (32, 32, 1)
    weighed = rgb.read(7) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(bright.read(7)[..., 0] - weighed).max() <= 0.51
    assert "have 3, or 1 as luma" in sentence(open_shapes, channels=2)
