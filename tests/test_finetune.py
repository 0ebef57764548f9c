"""Fine-tuning a copy of the backbone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dino_lite.contracts import UserError
from dino_lite.data.mixing import mix
from dino_lite.eval.baselines import raw_pixels
from dino_lite.eval.finetune import Finetune, find_labeled
from pooled import shades, small_vit, store_of
from test_features import half_broken, images

QUICK = {"num_epochs": 4, "batch_size": 12, "rate": 0.02}


@pytest.mark.slow
def test_it_learns_on_a_copy() -> None:
    """The backbone that was given has its weights, its mode and no gradient."""
    backbone = small_vit(drop_path=0.5).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    found = Finetune(**QUICK)(backbone, store_of(shades(60), shades(12, seed=1)))
    assert json.loads(json.dumps(found)) == found
    assert found["value"] == found["mean_per_class"] == 100.0
    assert found["interval"] == [100.0, 100.0]
    assert (found["num_train"], found["num_test"]) == (60, 12)
    assert all(torch.equal(before[name], v) for name, v in backbone.state_dict().items())
    assert backbone.training
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.slow
def test_the_whole_network_is_trained() -> None:
    """All parameters of the copy move, frozen ones too; the global generator is left alone."""
    backbone = small_vit().requires_grad_(False)
    probe, store = Finetune(**QUICK, weight_decay=0.0), store_of(shades(60), shades(12, seed=1))
    state = torch.random.get_rng_state()
    network, _ = probe._train(backbone, store, find_labeled(store))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in network.named_parameters():
        assert not torch.equal(parameter, backbone.get_parameter(name)), name


def test_the_seed_decides_and_mixing_is_told() -> None:
    """Twice the same is the same, with mixup and cutmix too."""
    store = store_of(shades(24), shades(12, seed=1))
    probe = Finetune(num_epochs=1, batch_size=8, mixup=0.8, cutmix=1.0)
    backbone = small_vit()
    found = probe(backbone, store)
    assert "mixup and cutmix" in found["protocol"]
    assert probe(backbone, store) == found


def test_lower_layers_learn_more_slowly() -> None:
    """With a decay next to nothing only the head and the last norm move as far as they would."""
    backbone, store = small_vit(), store_of(shades(24), shades(12, seed=1))
    found = find_labeled(store)
    network, head = Finetune(**QUICK, layer_decay=1e-3, weight_decay=0.0)._train(
        backbone, store, found
    )
    moved = {
        name: float((parameter - backbone.get_parameter(name)).detach().abs().max())
        for name, parameter in network.named_parameters()
    }
    full = moved["norm.bias"]
    assert full > 3e-4
    assert float(head.weight.detach().abs().max()) > 0.1 * full
    assert 0 < moved["blocks.1.mlp.fc2.bias"] < 1e-2 * full
    assert moved["blocks.0.mlp.fc2.bias"] < 1e-4 * full
    assert moved["cls_token"] < 1e-6 * full


def test_mixed_images_have_mixed_classes() -> None:
    """An image's classes have the shares of its pixels, whichever way it was mixed."""
    plain = torch.arange(4.0)[:, None, None, None].expand(4, 1, 8, 8).contiguous()
    wanted = torch.eye(4)
    generator, kinds = np.random.default_rng(0), set()
    for _ in range(60):
        images, classes = mix(plain, wanted, 0.8, 1.0, generator)
        torch.testing.assert_close(classes.sum(dim=1), torch.ones(4))
        pixels = images.mean(dim=(1, 2, 3))
        torch.testing.assert_close(pixels, classes @ torch.arange(4.0))
        kinds.add("mixup" if len(images[1].unique()) == 1 else "cutmix")
    assert kinds == {"mixup", "cutmix"}
    assert torch.equal(plain[:, 0, 0, 0], torch.arange(4.0))
    assert mix(plain, wanted, 0.0, 0.0, generator)[0] is plain


def test_raw_pixels_are_a_linear_classifier() -> None:
    """A baseline without parameters is measured too."""
    store = store_of(shades(36), shades(12, seed=1))
    found = Finetune(**QUICK)(raw_pixels(store.data), store)
    assert found["num_test"] == 12


def test_without_test_labels_a_fifth_of_train_is_the_test() -> None:
    """Unlabeled images and classes with any numbers are no trouble."""
    labels = [-1 if i >= 30 else 7 * (i % 3) for i in range(36)]
    found = Finetune(**QUICK)(small_vit(), store_of(shades(36, labels=labels)))
    assert (found["num_train"], found["num_test"]) == (24, 6)
    assert "held out of train" in found["protocol"]


def test_images_that_cannot_be_read_are_left_out() -> None:
    """In train and in test, and noted."""
    source = images(12, half_broken)
    source.labels = np.arange(12) % 2
    store = store_of(source, source)
    found = Finetune(num_epochs=1, batch_size=4)(small_vit(), store)
    assert found["num_test"] == 8
    assert len(store.data.bad) == 4


def test_what_cannot_be_learned_or_set_is_a_sentence() -> None:
    """One class, no labels, settings out of range."""
    with pytest.raises(UserError, match="2 classes"):
        Finetune()(small_vit(), store_of(shades(6, labels=[0] * 6)))
    unlabeled = shades(6)
    unlabeled.labels = None
    with pytest.raises(UserError, match="needs labels"):
        Finetune()(small_vit(), store_of(unlabeled))
    for wrong in (
        {"num_epochs": 0},
        {"batch_size": 0},
        {"rate": 0.0},
        {"layer_decay": 1.5},
        {"mixup": -1.0},
        {"scale": [0.9, 0.1]},
        {"scale": [0.0, 1.0]},
        {"warmup": "x"},
        {"warmup": 2.0},
    ):
        with pytest.raises(UserError, match=rf"Finetune\.{next(iter(wrong))}="):
            Finetune(**wrong)
