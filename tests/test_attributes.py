"""Several labels, and numbers, read off frozen features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score

from dino_lite.contracts import UserError
from dino_lite.eval.attributes import MultiLabel, Regression
from pooled import shades, small_vit, store_of


def table(path: Path, num_train: int, num_test: int, columns: str = "label") -> str:
    """A row for each image: its class as labels, or its brightness and something of no use."""
    lines = ["path,dark,not_bright,never" if columns == "label" else "path,level,noise"]
    draw = np.random.default_rng(0)
    for seed, num in ((0, num_train), (1, num_test)):
        for i in range(num):
            kind, noise = i % 3, round(float(draw.normal()), 3)
            row = [int(kind == 0), int(kind < 2), 0] if columns == "label" else [100 * kind, noise]
            lines.append(",".join(map(str, [f"shades{seed}[{i}]", *row])))
    path.write_text("\n".join(lines))
    return str(path)


def test_labels_are_found_each_by_itself(tmp_path: Path) -> None:
    """A label that no image has is told, and no part of the mean."""
    name = table(tmp_path / "t.csv", 48, 12)
    found = MultiLabel(name)(small_vit(), store_of(shades(48), shades(12, seed=1)))
    assert json.loads(json.dumps(found)) == found
    assert found["value"] == 100.0
    assert found["interval"] is None
    assert [(r["label"], r["in test"], r["AP %"]) for r in found["table"]] == [
        ("dark", 4, 100.0),
        ("not_bright", 8, 100.0),
        ("never", 0, None),
    ]
    assert (found["num_train"], found["num_test"], found["without_row"]) == (48, 12, 0)


def test_numbers_are_explained_as_ridge_regression_does(tmp_path: Path) -> None:
    """What is in the image is explained, what is not is not; each column has its own penalty."""
    name = table(tmp_path / "t.csv", 48, 12, "numbers")
    backbone, store = small_vit(), store_of(shades(48), shades(12, seed=1))
    found = Regression(name)(backbone, store)
    assert json.loads(json.dumps(found)) == found
    level, noise = found["table"]
    assert level["R²"] > 0.8
    assert level["mean absolute error"] < 30
    assert noise["R²"] < 0.3 < level["R²"]
    assert found["value"] == pytest.approx((level["R²"] + noise["R²"]) / 2)
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    train, test = (
        store.pooled(backbone, source).features().features.double().numpy()
        for source in store.data.splits[:2]
    )
    alone = RidgeCV(np.logspace(-3, 6, 19)).fit(train, 100.0 * (np.arange(48) % 3))
    expected = np.abs(alone.predict(test) - 100 * (np.arange(12) % 3)).mean()
    assert level["mean absolute error"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind", [MultiLabel, Regression])
def test_images_without_a_row_are_left_out_and_counted(kind: type, tmp_path: Path) -> None:
    """And where no test image has one, a fifth of train is the test."""
    columns = "label" if kind is MultiLabel else "numbers"
    name = table(tmp_path / "t.csv", 40, 0, columns)
    found = kind(name)(small_vit(), store_of(shades(48), shades(12, seed=1)))
    assert (found["num_train"], found["num_test"], found["without_row"]) == (32, 8, 20)
    assert "held out of train" in found["protocol"]
    assert "20 images without a row left out" in found["protocol"]


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (MultiLabel, None, "is not set"),
        (Regression, None, "is not set"),
        (MultiLabel, "2", "other numbers than 0 and 1"),
        (MultiLabel, "0", "no 1 for any image"),
        (Regression, "4", "the same for all"),
    ],
)
def test_what_cannot_be_learned_is_a_sentence(
    kind: type, text: str | None, words: str, tmp_path: Path
) -> None:
    """The key is named."""
    name = None
    if text is not None:
        lines = ["path,x", *(f"shades0[{i}],{text}" for i in range(12))]
        (tmp_path / "t.csv").write_text("\n".join(lines))
        name = str(tmp_path / "t.csv")
    with pytest.raises(UserError, match=words) as caught:
        kind(name)(small_vit(), store_of(shades(12)))
    assert "targets" in str(caught.value)


@pytest.mark.parametrize("kind", [MultiLabel, Regression])
def test_impossible_settings_are_refused_by_their_own_keys(kind: type) -> None:
    """Not by those of the evaluation they are built on."""
    with pytest.raises(UserError, match=rf"{kind.__name__}\.powers=\[-1\]: .*two numbers"):
        kind(powers=[-1])


def test_the_interval_of_r2_draws_its_variance_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples are images drawn anew, each with its own variance: plain loops over scikit-learn's
    R² give the same.
    """
    name, draw = table(tmp_path / "t.csv", 48, 12, "numbers"), np.random.default_rng(0)
    times = draw.multinomial(12, np.full(12, 1 / 12), 1000)
    asked: list[np.ndarray] = []
    plain = RidgeCV.predict

    def predict(self: RidgeCV, features: np.ndarray) -> np.ndarray:
        asked.append(plain(self, features))
        return asked[-1]

    monkeypatch.setattr(RidgeCV, "predict", predict)
    found = Regression(name)(small_vit(), store_of(shades(48), shades(12, seed=1)))
    rows = [row.split(",")[1:] for row in Path(name).read_text().splitlines()[-12:]]
    wanted = np.array(rows, dtype=float)
    values = [
        r2_score(np.repeat(wanted, each, axis=0), np.repeat(asked[-1], each, axis=0))
        for each in times
    ]
    assert found["interval"] == pytest.approx(np.percentile(values, (2.5, 97.5)), rel=1e-4)
