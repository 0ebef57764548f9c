"""Born-Again Networks: the losses, and fine-tuning in generations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import oracle
from dino_lite.backbones.convnet import ConvNet
from dino_lite.contracts import UserError
from dino_lite.eval.agreement import Standing, learned_mistakes
from dino_lite.eval.born_again import Predictions, born_again_loss, generations_told, permuted
from dino_lite.eval.finetune import Finetune, find_labeled
from dino_lite.report.terminal import print_results
from pooled import generator, shades, small_vit, store_of

QUICK = {"num_epochs": 1, "batch_size": 8, "rate": 0.02}


def draw(num: int, seed: int, num_classes: int = 5) -> torch.Tensor:
    """Logits of a few images."""
    return 2 * torch.randn(num, num_classes, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("objective", ["labels+logits", "logits", "cwtm"])
def test_losses_equal_plain_loops(objective: str, temperature: float) -> None:
    """Value and gradient, with labels that are mixed."""
    logits, teacher, wanted = draw(6, 0).requires_grad_(), draw(6, 1), draw(6, 2).softmax(dim=1)
    expected = oracle.born_again(logits, teacher, wanted, objective, temperature)
    (gradient,) = torch.autograd.grad(expected, logits)
    found = born_again_loss(
        logits, teacher, wanted, objective, temperature, np.random.default_rng(0)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], gradient)


def test_permuted_predictions_keep_the_largest_in_place() -> None:
    """The other values move to each place equally often, and differently in each row; the loss is
    the cross-entropy with them.
    """
    probs = draw(3000, 1, num_classes=4)[:1].softmax(dim=1).expand(3000, 4)
    moved = permuted(probs, np.random.default_rng(0))
    top = int(probs[0].argmax())
    assert torch.equal(moved[:, top], probs[:, top])
    assert torch.equal(moved.sort(dim=1).values, probs.sort(dim=1).values)
    for place in set(range(4)) - {top}:
        for value in set(range(4)) - {top}:
            share = (moved[:, place] == probs[0, value]).double().mean()
            assert abs(float(share) - 1 / 3) < 0.05
    logits, teacher, wanted = draw(6, 0), draw(6, 1), draw(6, 2).softmax(dim=1)
    found = born_again_loss(logits, teacher, wanted, "dkpp", 2.0, np.random.default_rng(7))
    same = permuted((teacher / 2).softmax(dim=1), np.random.default_rng(7))
    expected = oracle.born_again(logits, 2 * same.log(), wanted, "logits", 2.0)
    torch.testing.assert_close(found, expected)


def test_two_classes_have_nothing_to_permute() -> None:
    """Then permuted predictions are the teacher's."""
    probs = draw(5, 3, num_classes=2).softmax(dim=1)
    assert torch.equal(permuted(probs, np.random.default_rng(0)), probs)


def test_the_first_generation_is_ordinary_fine_tuning() -> None:
    """Whatever follows it; each later one starts anew and sees other crops."""
    backbone, store = small_vit(), store_of(shades(24), shades(12, seed=1))
    plain = Finetune(**QUICK)(backbone, store)
    assert "generations" not in plain
    assert plain == Finetune(**QUICK, generations=1, born_again="dkpp")(backbone, store)
    several = Finetune(**QUICK, mixup=0.8, generations=3)
    found = several(backbone, store)
    assert json.loads(json.dumps(found)) == found
    first = Finetune(**QUICK, mixup=0.8)(backbone, store)
    assert found["generations"][0]["top1"] == first["value"]
    assert found["generations"][0]["interval"] == first["interval"]
    assert found["generations"][-1]["top1"] == found["value"]
    assert [row["generation"] for row in found["table"]] == ["1", "2", "3", "ensemble"]
    assert "generation 3, each trained with labels and the logits" in found["protocol"]


@pytest.mark.parametrize("objective", ["labels+logits", "logits", "cwtm", "dkpp"])
def test_a_generation_learns_from_its_teacher_as_asked(objective: str) -> None:
    """Labels that are all wrong do not matter to a student of logits alone; they do to others."""
    backbone, truth = small_vit(), shades(24)
    wrong = shades(24, labels=[(i + 1) % 3 for i in range(24)])
    probe = Finetune(**QUICK, born_again=objective)
    teacher = probe._train(backbone, store_of(truth), find_labeled(store_of(truth, truth)))
    students = [
        probe._train(backbone, store, find_labeled(store), 2, [teacher])
        for store in (store_of(truth, truth), store_of(wrong, truth))
    ]
    same = torch.equal(*(student.head.weight for student in students))
    assert same == (objective in ("logits", "dkpp"))
    assert not torch.equal(students[0].head.weight, teacher.head.weight)


def test_from_scratch_every_generation_has_new_weights() -> None:
    """Drawn from the seed; the backbone's weights and the global generator are unused."""
    probe, backbone = Finetune(**QUICK, from_scratch=True), small_vit()
    assert probe.layer_decay == 1.0
    state = torch.random.get_rng_state()
    begun = [probe._start(backbone, 3, seed).network.state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(begun[0][name], begun[1][name])
    assert not torch.equal(begun[0][name], begun[2][name])
    assert not torch.equal(begun[0][name], backbone.state_dict()[name])


@pytest.mark.parametrize("from_scratch", [False, True])
def test_batch_normalization_learns_its_statistics_from_scratch(from_scratch: bool) -> None:
    """And tests with them; pretrained ones stay as they are."""
    backbone = ConvNet(widths=[8, 16], depths=[1, 1], patch_size=4, norm="batch")
    store = store_of(shades(24), shades(12, seed=1))
    probe = Finetune(**QUICK, from_scratch=from_scratch)
    network, _ = probe._train(backbone, store, find_labeled(store))
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    assert all(bool(norm.running_mean.any()) == from_scratch for norm in norms)
    assert not any(part.training for part in network.modules())


def test_what_is_told_of_generations() -> None:
    """Accuracies, agreement of each with the one before, and the ensemble, by hand."""
    labels = torch.tensor([0, 1, 2, 0])
    each = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 1], [0, 1, 2, 1]])
    found = generations_told(Predictions(each, torch.tensor([0, 1, 2, 0]), labels))
    rows = found["generations"]
    assert [row["top1"] for row in rows] == [50.0, 50.0, 75.0]
    assert [row["agreement"] for row in rows] == [None, 75.0, 75.0]
    assert found["ensemble"]["top1"] == 100.0
    assert "warnings" not in found


def planted(accuracies: list[float], agreements: list[float | None], num: int) -> list[str]:
    """What is said of such stages."""
    return learned_mistakes(
        [
            Standing(f"generation {i}", accuracy, agreement, num)
            for i, (accuracy, agreement) in enumerate(zip(accuracies, agreements, strict=True), 1)
        ]
    )


def test_agreement_that_rises_while_accuracy_falls_is_told() -> None:
    """And nothing else: neither both rising, nor both falling, nor a fall that chance explains."""
    (told,) = planted([70.0, 71.0, 60.0], [None, 80.0, 90.0], 2000)
    assert "from generation 2 to generation 3 agreement" in told
    assert "rose from 80.0 to 90.0 %" in told
    assert "fell from 71.0 to 60.0 %" in told
    assert planted([70.0, 71.0, 75.0], [None, 80.0, 90.0], 2000) == []
    assert planted([70.0, 71.0, 60.0], [None, 90.0, 80.0], 2000) == []
    assert planted([70.0, 71.0, 60.0], [None, 80.0, 90.0], 20) == []
    assert planted([71.0, 60.0], [None, 90.0], 2000) == []


def test_generations_that_learn_mistakes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the table, in the terminal; the JSON holds it too."""
    each = torch.ones(3, 2000, dtype=torch.long)
    for generation, num_right in enumerate((1400, 700, 500)):
        each[generation, :num_right] = 0
    found = generations_told(Predictions(each, each[0], torch.zeros(2000, dtype=torch.long)))
    told = {"metric": "m", "protocol": "p", "unit": "%", "value": 25.0, "interval": None}
    counts = {"settings": {}, "num_train": 1, "num_test": 1, "seconds": 1.0, "unreadable": 0}
    print_results({"": {"finetune": told | counts | found}})
    shown = capsys.readouterr().out
    assert "warning: from generation 2 to generation 3" in shown
    assert "agreement with its teacher %" in shown


def test_settings_of_generations_are_checked() -> None:
    """In one sentence with the key."""
    for wrong in ({"generations": 0}, {"born_again": "soft"}, {"temperature": 0.0}):
        with pytest.raises(UserError, match=rf"Finetune\.{next(iter(wrong))}="):
            Finetune(**wrong)
