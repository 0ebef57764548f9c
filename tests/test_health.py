"""Health: each number by its definition; alarms that fire on planted collapses only."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_lite.contracts import Prototypes, Scores, Targets, UserError
from dino_lite.eval import collapse as module
from dino_lite.eval.collapse import collapse, health, look, rankme, relative_std
from dino_lite.losses.prototype import cross_view_pairs
from dino_lite.methods import dino
from ranks import command
from tiny import checkpoint, tiny_command, train

T, S, N, E, K = 2, 4, 6, 5, 7


def match(seed: int = 0, temp: float = 0.1, num_images: int = N) -> tuple[Scores, Targets]:
    """Random unit vectors, prototypes of lengths of their own, and a center."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    theirs = Prototypes(unit(K, E), torch.rand(K, 1, generator=generator) + 0.5)
    z, center = unit(T, num_images, E), torch.randn(K, generator=generator) * 0.1
    col = -center / temp
    row = -(z @ theirs.rows().T / temp + col).logsumexp(-1)
    weight = torch.full((num_images,), 1 / num_images)
    targets = Targets(z, theirs, row, col, temp, cross_view_pairs(T, S), weight)
    return Scores(unit(S, num_images, E), Prototypes(unit(K, E))), targets


def entropy(p: Tensor) -> float:
    return -sum(float(x) * math.log(float(x)) for x in p if x > 0)


def test_every_number_is_its_definition() -> None:
    """Against loops over crops, images and pairs of crops."""
    scores, targets = match()
    found = health([look(scores, targets, N)])
    q = targets.probs().double().reshape(T * N, K)
    mean = q.mean(0)
    largest = targets.probs().argmax(-1)
    guess = scores.logits().argmax(-1)
    agree = [
        float(largest[t, i] == guess[s, i])
        for t in range(T)
        for s in range(T)
        for i in range(N)
        if s != t
    ]
    crops = [entropy(row) for row in q]
    expected = {
        "teacher_entropy": sum(crops) / len(crops),
        "teacher_information": entropy(mean) - sum(crops) / len(crops),
        "kl_to_uniform": sum(float(p) * math.log(float(p) * K) for p in mean),
        "prototypes_used": len(set(largest.flatten().tolist())),
        "prototype_perplexity": math.exp(entropy(mean)),
        "center_norm": float(torch.linalg.vector_norm(targets.col * targets.temp)),
        "embedding_std": relative_std(targets.z.reshape(T * N, E)),
        "agreement": sum(agree) / len(agree),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_micro_batches_and_chunks_add_up(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Images seen in parts give what they give at once; no more images are seen than asked."""
    scores, targets = match()
    whole = health([look(scores, targets, N)])
    monkeypatch.setattr(module, "_LOGITS_BYTES", chunk * T * K * 4)
    first = look(Scores(scores.z[:, :2], scores.prototypes), targets.part(0, 2), 9)
    rest = look(Scores(scores.z[:, 2:], scores.prototypes), targets.part(2, N), 9)
    assert health([first.plus(rest)]) == pytest.approx(whole, rel=1e-4)
    assert look(scores, targets, 3).num_crops == 3 * T


def test_prototypes_are_counted_over_all_looks() -> None:
    """More of them with two looks than with the last alone; the rest is the last look's."""
    looks = [look(*match(seed, num_images=2), 2) for seed in (0, 1)]
    both, last = health(looks), health(looks[1:])
    assert both["prototypes_used"] > last["prototypes_used"]
    assert both["teacher_entropy"] == last["teacher_entropy"]


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("num", [20, 6])
def test_rankme_is_the_rank_of_equal_directions(rank: int, num: int) -> None:
    """`rank` orthogonal directions of equal strength have that effective rank, at any scale."""
    rank = min(rank, num)
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(num, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(12, rank, generator=generator)).Q
    assert rankme(left @ right.T * 50) == pytest.approx(rank, rel=1e-4)


def test_rankme_is_the_entropy_of_singular_values() -> None:
    """By the formula, of uneven features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 9, generator=generator) * torch.arange(1.0, 10.0)
    values = torch.linalg.svdvals(features.double())
    expected = math.exp(entropy(values / values.sum()))
    assert rankme(features) == pytest.approx(expected, rel=1e-5)


def test_relative_std_is_one_on_the_sphere_and_zero_in_a_point() -> None:
    """Whatever the rows' lengths."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 16, generator=generator) * torch.rand(4000, 1, generator=generator)
    assert relative_std(rows) == pytest.approx(1.0, abs=0.02)
    assert relative_std(torch.ones(10, 16) * torch.arange(1.0, 11.0)[:, None]) < 1e-6


def test_without_prototypes_the_spread_of_embeddings_is_all() -> None:
    """Summed over micro-batches; an alarm where it is nearly nothing, none where it is unknown."""
    scores, targets = match()
    none = Prototypes(torch.zeros(0, E))
    scores = scores._replace(prototypes=none)
    targets = targets._replace(prototypes=none, row=torch.zeros(T, N), col=torch.zeros(0))
    first = look(scores._replace(z=scores.z[:, :2]), targets.part(0, 2), 9)
    rest = look(scores._replace(z=scores.z[:, 2:]), targets.part(2, N), 9)
    found = health([first.plus(rest)])
    assert found == {"embedding_std": pytest.approx(relative_std(targets.z.reshape(T * N, E)))}
    assert collapse(found, 0, 0.04) is None
    alarm = collapse({"embedding_std": 0.001}, 0, 0.04)
    assert alarm is not None
    assert alarm.kind == "constant_features"
    assert collapse({"embedding_std": math.nan}, 0, 0.04) is None


VALUES = {"prototype_perplexity": 100.0, "teacher_information": 0.5, "embedding_std": 0.1}


@pytest.mark.parametrize(
    ("values", "temp", "kind", "knob"),
    [
        ({"prototype_perplexity": 1.2}, 0.04, "one_prototype", "method.center_momentum"),
        ({"teacher_information": 1e-4}, 1.0, "uniform_teacher", "method.teacher_temp"),
        ({"teacher_information": 1e-4}, 0.04, "constant_features", "optim.rate"),
    ],
)
def test_an_alarm_names_its_knob(
    values: dict[str, float], temp: float, kind: str, knob: str
) -> None:
    """One sentence each; healthy numbers and such that are not finite raise none."""
    alarm = collapse(VALUES | values, 512, temp)
    assert alarm is not None
    assert alarm.kind == kind
    assert knob in alarm.text
    assert alarm.text.startswith("collapse: ")
    assert collapse(VALUES, 512, temp) is None
    assert collapse(dict.fromkeys(VALUES, math.nan), 512, temp) is None


# ----------------------------------------------------------------------------------- in real runs

QUICK = (
    "callbacks.health.every_n_steps=2",
    "callbacks.online_eval=null",
    "callbacks.progress=null",
)
STOP = "callbacks.health.on_collapse=stop"
PLANTED = {
    "one_prototype": ["method.center_momentum=1.0"],
    "uniform_teacher": ["method.teacher_temp.start=1.0", "method.teacher_temp.end=1.0"],
    "constant_features": ["optim.rate=1.6"],  # a hundred times what a run of this width takes
}


def warnings_of(run: Path) -> list[dict[str, Any]]:
    """What results.json keeps."""
    found: list[dict[str, Any]] = json.loads((run / "results.json").read_text()).get("warnings", [])
    return found


KINDS = ("one_prototype", "uniform_teacher", "constant_features")


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_collapse_stops_the_run_with_its_sentence(tmp_path: Path, kind: str) -> None:
    """Before its end; last.ckpt is kept, and results.json knows why."""
    with pytest.raises(UserError, match="collapse: ") as stopped:
        train(tmp_path, *QUICK, STOP, *PLANTED[kind], "trainer.max_steps=200")
    (run,) = tmp_path.iterdir()
    (warning,) = warnings_of(run)
    # Where a rate that is far too high ends is chaos, and may differ from CPU to CPU.
    assert warning["kind"] in (KINDS if kind == "constant_features" else (kind,))
    assert warning["text"] == str(stopped.value)
    assert 20 <= warning["step"] < 200
    assert checkpoint(run)["global_step"] == warning["step"]


@pytest.mark.slow
def test_a_short_run_is_watched_by_default(tmp_path: Path) -> None:
    """A hundred steps have time for an alarm without any key."""
    options = [*QUICK[1:], *PLANTED["uniform_teacher"], "trainer.max_steps=100"]
    assert [w["kind"] for w in warnings_of(train(tmp_path, *options))] == ["uniform_teacher"]


@pytest.mark.slow
def test_all_processes_stop_together(tmp_path: Path) -> None:
    """What rank 0 sees ends the others too, between the same two steps."""
    options = [*QUICK[:1], STOP, *PLANTED["uniform_teacher"], "trainer.max_steps=60"]
    words = tiny_command(tmp_path, *options, "trainer.devices=2")
    result = command("pretrain", *words, ranks=2)
    assert result.returncode == 2, result.stderr[-3000:]
    assert result.stderr.count("collapse: ") == 1
    (run,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert checkpoint(run)["global_step"] == warnings_of(run)[0]["step"]


@pytest.mark.slow
def test_an_aliased_teacher_is_known_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said once where it warns; where it stops, no step is made."""

    class Alias(dino.EMATeacher):
        def __init__(self, student: Any, momentum: Any) -> None:
            super().__init__(student, momentum)
            self.module = student

    monkeypatch.setattr(dino, "EMATeacher", Alias)
    run = train(tmp_path / "warn", *QUICK)
    assert [warning["kind"] for warning in warnings_of(run)] == ["aliased_teacher"]
    assert capsys.readouterr().err.count("shares weights with the student") == 1
    with pytest.raises(UserError, match="shares weights"):
        train(tmp_path / "stop", *QUICK, STOP)
    (stopped,) = (tmp_path / "stop").iterdir()
    assert not (stopped / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_a_warning_is_said_once_a_kind_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many looks see the same collapse; one line says it."""
    run = train(tmp_path, *QUICK, *PLANTED["uniform_teacher"], "trainer.max_steps=60")
    assert [warning["kind"] for warning in warnings_of(run)] == ["uniform_teacher"]
    assert capsys.readouterr().err.count("warning: collapse") == 1
    assert checkpoint(run)["global_step"] == 60


HEALTHY = {
    "plain": [],
    "seed": ["seed=1"],
    "batch_norm": ["method.head.batch_norm=true"],
    "bf16": ["trainer.precision=bf16", "seed=2"],
    "temperature": ["method.teacher_temp.end=0.07"],
    "compat": [
        "optim.clip_by=parameter",
        "optim.decay_tokens=true",
        "method.teacher_temp.per=epoch",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", HEALTHY.values(), ids=HEALTHY)
def test_healthy_runs_raise_no_alarm(tmp_path: Path, options: list[str]) -> None:
    """Nor does their frozen, nearly uniform beginning."""
    run = train(tmp_path, *QUICK, STOP, *options, "trainer.max_steps=60")
    assert warnings_of(run) == []
    assert checkpoint(run)["global_step"] == 60


@pytest.mark.slow
def test_health_changes_no_weight_with_batch_norm_and_drop_path(tmp_path: Path) -> None:
    """Running statistics, drawn paths and micro-batches are as without it, to the last bit."""
    options = ["backbone.drop_path=0.3", "method.head.batch_norm=true", "seed=3"]
    options += ["trainer.max_steps=4", "trainer.micro_batch_size=3"]
    seen = checkpoint(train(tmp_path / "a", *options, "callbacks.health.every_n_steps=1"))
    alone = checkpoint(train(tmp_path / "b", *options, "callbacks.health=null"))
    for name, value in alone["state_dict"].items():
        assert torch.equal(seen["state_dict"][name], value), name


@pytest.mark.slow
def test_looks_are_logged_when_they_are_due(tmp_path: Path) -> None:
    """Each third step, in the row of that step; a run in micro-batches sees the same images."""
    columns = []
    for micro in (0, 3):
        options = [f"trainer.micro_batch_size={micro}", "callbacks.health.every_n_steps=3"]
        run = train(tmp_path / str(micro), *options)
        with open(run / "metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["teacher_entropy"]]
        assert [row["step"] for row in rows] == ["2", "5"]
        assert all(float(row["health_seconds"]) > 0 for row in rows)
        columns.append([float(row["teacher_entropy"]) for row in rows])
    assert columns[0] == pytest.approx(columns[1], rel=1e-3)
