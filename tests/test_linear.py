"""The linear probe: what chooses, what is reported, and how long it trains."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from dino_lite.commands.evaluate import run_evaluate
from dino_lite.config import compose
from dino_lite.contracts import UserError
from dino_lite.eval.baselines import raw_pixels
from dino_lite.eval.holdout import Task
from dino_lite.eval.linear import Linear
from dino_lite.eval.probes import Head, LinearHeads, join, make_grid, train
from dino_lite.eval.short_grid import WINDOW, choose_near, in_span, train_until_still
from golden.adapters_linear import d24_grid, d24_run
from pooled import draw_pooled, draw_task, shades, small_vit, store_of
from test_golden import cases, check_golden

QUICK = {"num_steps": 60, "rates": [1e-3, 0.1]}


def test_classes_that_lie_apart_are_told_apart() -> None:
    """The result is plain JSON with an interval, all heads by number, and both choices."""
    found = Linear(**QUICK).score(draw_task(60, 30, noise=0.1))
    assert json.loads(json.dumps(found)) == found
    assert found["value"] == found["mean_per_class"] == 100.0
    assert found["interval"] == [100.0, 100.0]
    assert [record["head"] for record in found["heads"]] == list(range(8))
    assert found["reference_choice"]["chosen_on"] == "test"
    assert found["num_train"] == 60
    assert "best of 8 linear heads" in found["protocol"]
    assert (
        "selected on 6 images held out of train (a tenth of each class, at least one)"
        in found["protocol"]
    )
    assert "not augmented" in found["protocol"]
    assert len(found["table"]) == 4


def test_the_test_images_choose_nothing() -> None:
    """With other test labels the same head is reported; the references' choice is another's."""
    task = draw_task(90, 45, noise=1.5)
    turned = task._replace(test=task.test._replace(labels=(task.test.labels + 1) % 3))
    honest, mocked = (Linear(num_steps=80).score(each) for each in (task, turned))
    assert honest["chosen"]["head"] == mocked["chosen"]["head"]
    assert honest["value"] > mocked["value"]
    for found in (honest, mocked):
        best = max(record["test %"] for record in found["heads"])
        assert found["reference_choice"]["value"] == best >= found["value"]
        assert found["chosen"]["test %"] == pytest.approx(found["value"])
        most = max(record["held out %"] for record in found["heads"])
        assert found["chosen"]["held out %"] == most


def test_what_is_chosen_is_trained_anew_on_all_of_train() -> None:
    """The heads' numbers on test are those of a grid that held nothing out."""
    task = draw_task(60, 45, noise=2.0)
    found, all_of_it = (Linear(choose=how, **QUICK).score(task) for how in ("held_out", "test"))
    assert [h["test %"] for h in found["heads"]] == [h["test %"] for h in all_of_it["heads"]]
    assert found["reference_choice"]["value"] == all_of_it["value"]
    assert "then retrained on all of train" in found["protocol"]


def test_classes_of_one_image_are_told() -> None:
    """They are learned, but choose nothing."""
    task = draw_task(60, 30, noise=0.1)
    labels = task.train.labels.clone()
    labels[0] = 3
    lone = task._replace(train=task.train._replace(labels=labels), num_classes=4)
    assert "none of 1 class with one image" in Linear(**QUICK).score(lone)["protocol"]


def test_the_same_seed_gives_the_same_result() -> None:
    """And the global generator is left alone."""
    task, state = draw_task(60, 30, noise=1.0), torch.random.get_rng_state()
    assert Linear(**QUICK).score(task) == Linear(**QUICK).score(task)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dinos_protocol_reports_the_best_epoch_on_test_and_says_so() -> None:
    """One head, nothing held out; the value is at least that of the last epoch."""
    probe = Linear([4], [False], [0.05], num_epochs=5, cosine="epoch", choose="test", batch_size=16)
    found = probe.score(draw_task(64, 60, noise=2.5))
    assert found["num_train"] == 64
    assert found["settings"]["steps"] == 20
    assert found["value"] == found["reference_choice"]["value"]
    assert found["value"] >= found["heads"][0]["test %"]
    assert 1 <= found["reference_choice"]["epoch"] <= 5
    assert (
        "one linear head on frozen features, the best of its epochs selected on the test images"
        in (found["protocol"])
    )


@pytest.mark.parametrize(
    ("num_images", "settings", "expected"),
    [
        (1_281_167, {}, (1024, 12_500)),
        (45_000, {}, (1024, 4300)),
        (945, {}, (128, 1000)),
        (50, {}, (16, 1000)),
        (9, {}, (9, 1000)),
        (945, {"batch_size": 2048, "num_steps": 7}, (945, 7)),
        (1_281_167, {"num_epochs": 100}, (1024, 125_100)),
    ],
)
def test_length_follows_the_number_of_images(
    num_images: int, settings: dict[str, int], expected: tuple[int, int]
) -> None:
    """Published where there are many; a hundred epochs, but a thousand steps, of few."""
    assert Linear(**settings).length(num_images) == expected


def test_a_backbone_is_measured_on_test_or_on_a_part_of_train() -> None:
    """Blocks that are not there are not read; without a test split a fifth of train is the test."""
    with_test = Linear(**QUICK)(small_vit(), store_of(shades(36), shades(12, seed=1)))
    alone = Linear(**QUICK)(small_vit(), store_of(shades(36)))
    assert with_test["value"] == 100.0
    assert with_test["num_test"] == 12
    assert {record["features"] for record in with_test["heads"]} == {
        "CLS",
        "CLS + mean patch",
        "CLS of 2 blocks",
        "CLS of 2 blocks + mean patch",
    }
    assert alone["num_test"] == 6
    assert "held out of train" in alone["protocol"]


def test_raw_pixels_are_measured_too() -> None:
    """A baseline has one block."""
    store = store_of(shades(36), shades(12, seed=1))
    found = Linear(**QUICK)(raw_pixels(store.data), store)
    assert len(found["heads"]) == 4
    assert found["value"] == 100.0


def test_what_cannot_be_learned_is_a_sentence() -> None:
    """One class, features that are not finite, classes of one image each."""
    with pytest.raises(UserError, match="2 classes"):
        Linear()(small_vit(), store_of(shades(6, labels=[0] * 6)))
    broken = small_vit()
    broken.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="diverged"):
        Linear()(broken, store_of(shades(12), shades(6)))
    task = draw_task(3, 3)
    with pytest.raises(UserError, match="two labeled"):
        Linear().score(task)


def test_messages_name_the_evaluation_that_was_asked_for() -> None:
    """As its YAML names itself; patches are no numbers."""
    with pytest.raises(UserError, match=r"eval\.linear_dino\.rates"):
        run_evaluate(compose("evaluate", ["eval=linear_dino", "eval.linear_dino.rates=[]"]))
    with pytest.raises(UserError, match=r"\[true\], \[false\] or both"):
        Linear(patches=[])


@pytest.mark.parametrize(
    "wrong",
    [
        {"rates": []},
        {"rates": [0.0]},
        {"blocks": [0]},
        {"patches": []},
        {"batch_size": 0},
        {"num_steps": "long"},
        {"num_epochs": -1},
        {"cosine": "day"},
        {"choose": "both"},
    ],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    """The key is named."""
    with pytest.raises(UserError, match=r"Linear\.") as caught:
        Linear(**wrong)
    assert next(iter(wrong)) in str(caught.value)


def test_a_diverged_head_is_not_chosen() -> None:
    """At an absurd rate logits are no numbers; the sane head is taken."""
    train, test, *rest = draw_task(60, 30, noise=0.1)
    large = [
        part._replace(cls=1e4 * part.cls, patches=1e4 * part.patches) for part in (train, test)
    ]
    found = Linear(num_steps=60, rates=[1e38, 0.1]).score(Task(*large, *rest))
    assert found["settings"]["rate"] == 0.1
    assert found["value"] == 100.0


def test_unlabeled_images_take_no_part() -> None:
    """A label of -1 is no class, in train and in test."""
    train = shades(36, labels=[-1 if i >= 30 else i % 3 for i in range(36)])
    test = shades(12, labels=[-1 if i >= 9 else i % 3 for i in range(12)], seed=1)
    found = Linear(**QUICK)(small_vit(), store_of(train, test))
    assert (found["num_train"], found["num_test"]) == (30, 9)


def test_golden_grid_and_run_hold(golden: object) -> None:
    """DINOv2's grid at two batch sizes, and twelve steps of two heads."""
    from safetensors.torch import load_file

    (case,) = [case for case in cases(golden) if case["id"].startswith("D24")]  # type: ignore[arg-type]
    tensors = load_file(golden / case["file"])  # type: ignore[operator]
    checks = [*d24_grid(case), *d24_run(case, tensors)]
    assert len(checks) == 14
    assert [check for check in checks if check_golden.nearness(check) > 1] == []


def test_features_are_read_from_more_blocks_than_asked_for() -> None:
    """Another evaluation may have kept more: the last ones are taken."""
    task = draw_task(60, 30, noise=0.1)
    more = draw_pooled(60, noise=0.1, num_blocks=4)
    assert torch.equal(more.cls, task.train.cls)
    found = Linear(blocks=[2], patches=[False], **QUICK).score(task)
    assert found["chosen"]["features"] == "CLS of 2 blocks"
    assert found["value"] == 100.0


def test_a_basis_of_the_training_set_keeps_what_a_head_learns() -> None:
    """With fewer images than numbers, logits of train and test are those of the features as they
    are; stages padded with zeros are left out.
    """
    fit, asked = draw_pooled(20, dim=30, seed=0), draw_pooled(12, dim=30, seed=1)
    fit, asked = (
        part._replace(cls=F.pad(part.cls, (0, 9)).double(), patches=part.patches.double())
        for part in (fit, asked)
    )
    kind = Head(2, patches=True, base_rate=0.1, rate=0.1)
    logits = []
    for one, other in ((fit, asked), in_span(kind, fit, asked)):
        grid = [kind] if one is fit else [kind._replace(num_blocks=1, patches=False)]
        heads = LinearHeads(grid, one, 3, torch.device("cpu"), seed=0)
        heads.weights[0].zero_()
        train(heads, one, 20, 50, seed=0)
        rows = join(other, torch.arange(12), torch.device("cpu"))[0]
        logits.append(heads.stacks[0].logits(rows, 3))
    torch.testing.assert_close(logits[0], logits[1])
    assert in_span(kind, fit)[0].cls.shape == (20, 1, 20)
    assert in_span(kind, draw_pooled(200, dim=30))[0].cls.shape == (200, 1, 90)


def test_the_short_grid_says_what_it_did() -> None:
    """Half of the rates, fewer steps, and only the chosen head is tested."""
    task = draw_task(60, 30, noise=0.1)
    found = Linear(grid="short").score(task)
    assert json.loads(json.dumps(found)) == found
    assert found["value"] == 100.0
    how = (
        "selected by the lowest loss among those within a standard error of the best accuracy on 6"
    )
    assert "one of 28 linear heads (short grid) " in found["protocol"]
    assert f"{how} images held out of train" in found["protocol"]
    assert found["settings"]["grid"] == "short"
    assert 200 <= found["settings"]["steps"] <= 1000
    tested = [record for record in found["heads"] if record["test %"] is not None]
    assert tested == [found["chosen"]]
    (row,) = [row for row in found["table"] if row["chosen"]]
    assert (row["head"], row["test %"]) == (found["chosen"]["head"], 100.0)
    assert [each["test %"] for each in found["table"]].count("") == 3
    assert found["reference_choice"] is None
    assert len(found["table"]) == 4


def test_the_short_grid_does_not_look_at_the_test_images() -> None:
    """With other test labels it trains and chooses the same."""
    task = draw_task(90, 45, noise=0.5)
    turned = task._replace(test=task.test._replace(labels=(task.test.labels + 1) % 3))
    probe = Linear([1], [False], grid="short")
    honest, mocked = (probe.score(each) for each in (task, turned))
    for key in ("features", "rate", "steps"):
        assert honest["settings"][key] == mocked["settings"][key]
    assert honest["value"] > mocked["value"]


def test_a_cpu_gets_the_short_grid_unless_settings_ask_for_more() -> None:
    """Rates and steps that are given are used as they are; a reference's protocol is full."""
    task = draw_task(60, 30, noise=0.1)
    own = Linear(grid="auto", **QUICK).score(task)
    assert own["settings"]["grid"] == "short"
    assert own["settings"]["steps"] == QUICK["num_steps"]
    assert len(own["heads"]) == 8
    full = Linear(grid="full", **QUICK).score(task)
    assert full["settings"]["grid"] == "full"
    assert "short" not in full["protocol"]
    assert Linear(grid="auto", choose="test").grid == "full"
    with pytest.raises(UserError, match="choose=held_out"):
        Linear(grid="short", choose="test")
    assert compose("evaluate", ["eval=linear"])["eval"]["linear"]["grid"] == "auto"


def test_the_loss_decides_between_accuracies_that_few_images_cannot_tell_apart() -> None:
    """Within a standard error of the best (here 4.6 points); a diverged head is never chosen."""
    correct = torch.zeros(100, 4, dtype=torch.bool)
    for head, num in enumerate((70, 67, 60, 70)):
        correct[:num, head] = True
    losses = torch.tensor([2.0, 1.5, 0.5, math.nan], dtype=torch.float64)
    chosen, judged = choose_near(correct, losses)
    assert chosen == 1
    assert judged.tolist() == [70, 67, 60, 70]
    assert choose_near(correct[:, :1], losses[:1])[0] == 0


def test_training_ends_within_a_window_of_a_loss_that_stands_still() -> None:
    """The step is found once, and a second training ends there too, at a rate of 0."""
    pooled = draw_pooled(60, noise=0.1)
    steps, rates = [], []

    def fit(still: int | None) -> int | None:
        heads = LinearHeads(make_grid([4], [True], [0.5], 60), pooled, 3, torch.device("cpu"), 0)
        plain = heads.step
        rates.clear()
        heads.step = lambda rows, labels, rate: rates.append(rate) or plain(rows, labels, rate)
        found = train_until_still(heads, pooled, 60, 5000, 0, "", still is None, still)
        steps.append(len(rates))
        return found

    still = fit(None)
    assert still is not None
    assert still % WINDOW == 0
    assert fit(still) == still
    assert steps == [still + WINDOW] * 2
    assert rates[-1] < 0.02 < 0.9 < rates[still - 1]
