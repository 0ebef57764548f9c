"""The nouns: where a run stands, and how batches and targets are cut into parts."""

from __future__ import annotations

import pytest
import torch

from dino_lite.backbones.vit import ViT
from dino_lite.contracts import (
    Backbone,
    Crops,
    Progress,
    Prototypes,
    Scores,
    Targets,
    Traits,
    UserError,
)
from dino_lite.methods.method import Method


def test_progress_knows_fraction_and_epoch() -> None:
    """Steps of the whole, and whole epochs that are behind."""
    assert Progress(25, 100, 10).fraction == 0.25
    assert [Progress(step, 100, 10).epoch for step in (0, 9, 10, 99)] == [0, 0, 1, 9]
    assert [Progress(step, 100, 2.5).epoch for step in (2, 3, 5)] == [0, 1, 2]


@pytest.mark.parametrize("at", [Progress(12, 10, 5), Progress(0, 0, 0), Progress(1, 0, 0)])
def test_progress_stays_in_its_bounds(at: Progress) -> None:
    """Past the end, and in a run of no length at all."""
    assert 0.0 <= at.fraction <= 1.0
    assert at.epoch >= 0


def crops() -> Crops:
    """Five images, two global and three local crops; every number is that of its image."""
    images = torch.arange(5.0)

    def fill(*shape: int) -> torch.Tensor:
        """The image's number everywhere in its crops."""
        return images.view(1, 5, *[1] * (len(shape) - 2)).expand(*shape).clone()

    return Crops(
        globals_=fill(2, 5, 3, 4, 4),
        locals_=fill(3, 5, 3, 2, 2),
        index=torch.arange(5) + 10,
        labels=torch.arange(5) + 20,
        boxes=fill(5, 5, 4),
        draws=fill(5, 5, 9),
        extra={"gram": fill(2, 5, 3, 8, 8)},
    )


def test_a_part_of_a_batch_is_those_images_in_every_field() -> None:
    """Images 1 and 2: nothing else is in the part, and nothing of them is missing."""
    part = crops().part(1, 3)
    assert part.num_images == 2
    assert part.locals_ is not None
    assert part.labels is not None
    for field in (part.globals_, part.locals_, part.boxes, part.draws, part.extra["gram"]):
        assert field.shape[1] == 2
        assert field[:, 0].unique().tolist() == [1.0]
        assert field[:, 1].unique().tolist() == [2.0]
    assert part.index.tolist() == [11, 12]
    assert part.labels.tolist() == [21, 22]


def test_parts_cover_the_batch() -> None:
    """Joined again they are the batch; the last may be smaller."""
    whole = crops()
    parts = [whole.part(start, start + 2) for start in (0, 2, 4)]
    assert [part.num_images for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.globals_ for part in parts], dim=1), whole.globals_)


def test_a_batch_without_the_optional_fields_has_parts_too() -> None:
    """No local crops, no labels."""
    part = crops()._replace(locals_=None, labels=None, extra={}).part(0, 1)
    assert part[1] is part[3] is None
    assert part.extra == {}


def test_a_part_of_targets_keeps_the_weights_of_the_batch() -> None:
    """Rows, images and weights are cut; prototypes, columns and pairs are all of them."""
    z, row = torch.randn(2, 5, 3), torch.randn(2, 5)
    weight, col = torch.rand(5), torch.randn(7)
    targets = Targets(z, Prototypes(torch.randn(7, 3)), row, col, 0.1, torch.rand(2, 4), weight)
    part = targets.part(1, 4)
    assert torch.equal(part.z, z[:, 1:4])
    assert torch.equal(part.row, row[:, 1:4])
    assert torch.equal(part.weight, weight[1:4])
    assert part.col is targets.col
    assert part.pairs is targets.pairs
    torch.testing.assert_close(part.probs(), targets.probs()[:, 1:4])


def test_scores_know_their_logits() -> None:
    """z·Pᵀ for every crop and image."""
    scores = Scores(torch.randn(3, 2, 4), Prototypes(torch.randn(6, 4)))
    logits = scores.logits()
    assert logits.shape == (3, 2, 6)
    assert float(logits[2, 1, 5]) == pytest.approx(
        float(scores.z[2, 1] @ scores.prototypes.direction[5])
    )


def test_a_vision_transformer_is_a_backbone() -> None:
    """Also for isinstance; another module is none."""
    assert isinstance(ViT(image_size=8, patch_size=8, embed_dim=4, depth=1, num_heads=1), Backbone)
    assert not isinstance(torch.nn.Identity(), Backbone)


def test_the_abstract_backbone_does_nothing() -> None:
    """What a family must write raises; what it may leave out has a default."""
    backbone, images = Backbone(), torch.zeros(1, 3, 8, 8)
    for call in (
        lambda: backbone(images),
        lambda: backbone.intermediate(images, [-1]),
        lambda: backbone.attention(images),
        lambda: backbone.depth_of("stem.weight"),
    ):
        with pytest.raises(NotImplementedError):
            call()
    backbone.set_memory("low", True)
    backbone.disable_noise()
    assert not backbone.takes_masks
    assert Backbone.traits(width=8) == Traits()
    assert Backbone.traits(embed_dim=768) == Traits()


def test_the_abstract_method_does_nothing() -> None:
    """Each part of it says so."""
    method, at, batch = Method(), Progress(0, 1, 1), crops()
    for call in (
        lambda: method.targets(batch, at),
        lambda: method.compare(batch, {}),
        lambda: method.after_step(at, torch.tensor(True)),
        lambda: method.schedules(),
        lambda: method.export_backbone(),
    ):
        with pytest.raises(NotImplementedError):
            call()


def test_a_user_error_is_an_ordinary_exception_with_a_sentence() -> None:
    """Commands catch it by its type and print nothing but its words."""
    assert str(UserError("data.root=x: there is no such folder.")).endswith("folder.")
    assert not issubclass(UserError, SystemExit)
