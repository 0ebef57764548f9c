"""`dino-lite evaluate`: what it prints, what it keeps, and several processes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dino_lite.commands.evaluate import run_evaluate
from dino_lite.config import compose
from dino_lite.contracts import UserError
from dino_lite.eval.results import result
from dino_lite.eval.retrieval import Retrieval
from dino_lite.report.terminal import print_results
from dino_lite.runs.run import merge_json
from ranks import command, on_ranks
from tiny import photos, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with its checkpoint."""
    return train(tmp_path_factory.mktemp("runs"))


def evaluated(run: Path, *overrides: str) -> dict:
    return run_evaluate(
        compose("evaluate", [f"checkpoint={run}", f"runs_dir={run.parent}", *overrides])
    )


@pytest.mark.slow
def test_a_result_says_all_that_is_needed_to_trust_it(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Value, protocol, settings, numbers of images, seconds: returned, printed, kept."""
    found = evaluated(whole)["knn"]
    assert {"metric", "value", "interval", "protocol", "settings", "seconds"} <= found.keys()
    assert (found["num_train"], found["num_test"]) == (44, 20)
    kept = json.loads((whole / "results.json").read_text())["last"]["knn"]
    assert kept == found
    told = capsys.readouterr().out
    assert f"{found['value']:.2f} %" in told
    assert found["protocol"][:40] in told


def test_baselines_are_measured_by_the_same_protocol(whole: Path) -> None:
    """Raw pixels and the network untrained, beside the checkpoint."""
    found = evaluated(whole, "baselines=true")["knn"]
    assert found["baselines"].keys() == {"raw pixels", "untrained"}
    assert all(0 <= other["value"] <= 100 for other in found["baselines"].values())


def test_other_data_has_results_of_its_own(whole: Path, tmp_path: Path) -> None:
    """They stand beside those of the run's data, and do not replace them."""
    own = evaluated(whole)
    names = [
        f"{split}/{label}/{i}.png" for split in ("train", "val") for label in "ab" for i in "12"
    ]
    evaluated(whole, f"data.root={photos(tmp_path / 'others', names)}")
    kept = json.loads((whole / "results.json").read_text())["last"]
    assert kept["knn"]["value"] == own["knn"]["value"]
    assert kept["knn@others"]["data"] == "others"


def test_features_are_kept_below_the_runs_and_may_be_kept_nowhere(
    whole: Path, tmp_path: Path
) -> None:
    """`features_dir` names another folder, null none."""
    evaluated(whole)
    assert list((whole.parent / ".features").glob("*.safetensors"))
    evaluated(whole, f"features_dir={tmp_path / 'x'}")
    assert len(list((tmp_path / "x").iterdir())) == 2
    before = list(whole.parent.rglob("*.safetensors"))
    evaluated(whole, "features_dir=null")
    assert list(whole.parent.rglob("*.safetensors")) == before


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets and colons in files and classes are no markup."""
    names = ["holiday [final].jpg", "[/x]", ":smile:"]
    found = result(
        "[bold]",
        1.0,
        protocol="[/y]",
        settings={"on": "[/z]"},
        num_train=1,
        num_test=1,
        table=[{"[/t]": name} for name in names],
    )
    print_results({"": {"knn": found | {"seconds": 1.0, "unreadable": 0}}})
    told = capsys.readouterr().out
    for words in (*names, "[bold]", "[/y]", "on=[/z]", "[/t]"):
        assert words in told, words


def test_a_result_that_cannot_be_printed_is_kept(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What took hours to measure is written first."""

    def failing(_: object) -> None:
        raise BrokenPipeError

    (whole / "results.json").unlink()
    monkeypatch.setattr("dino_lite.commands.evaluate.print_results", failing)
    with pytest.raises(BrokenPipeError):
        evaluated(whole)
    assert "knn" in json.loads((whole / "results.json").read_text())["last"]


def test_nothing_to_measure_is_a_sentence(whole: Path) -> None:
    """eval= without a name."""
    with pytest.raises(UserError, match="lists no evaluation"):
        evaluated(whole, "eval=[]")


@pytest.mark.slow
def test_several_processes_measure_what_one_does(whole: Path, tmp_path: Path) -> None:
    """Started as by torchrun; one of them writes, and no image is counted twice."""
    alone = evaluated(whole, "features_dir=null")["knn"]
    copy = tmp_path / "together"
    words = [f"checkpoint={whole}", "accelerator=cpu", f"runs_dir={whole.parent}"]
    done = command("evaluate", *words, f"features_dir={copy}", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written to") == 1
    together = json.loads((whole / "results.json").read_text())["last"]["knn"]
    assert together["value"] == pytest.approx(alone["value"], abs=5.01)  # a tie may turn: one of 20
    assert (together["num_train"], together["num_test"]) == (44, 20)
    assert len(list(copy.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    "asked", ["eval.knn.ks=20", "eval.linear.rates=0.1", "eval.retrieval.ks=1"]
)
def test_a_value_of_another_kind_is_a_sentence(whole: Path, asked: str) -> None:
    """Which key, and what it may be."""
    name = asked.split(".")[1]
    with pytest.raises(UserError, match=rf"^{asked}: it must be a list of "):
        evaluated(whole, f"eval=[{name}]", asked)


def test_another_size_has_a_name_of_its_own_and_baselines_stay(whole: Path) -> None:
    """What was measured before is not thrown away."""
    evaluated(whole, "baselines=true")
    evaluated(whole)
    evaluated(whole, "image_size=24")
    kept = json.loads((whole / "results.json").read_text())["last"]
    assert kept["knn"]["baselines"].keys() == {"raw pixels", "untrained"}
    assert kept["knn@24px"]["image_size"] == 24


def add_results(rank: int, file: str) -> None:
    """One of two processes that write one file."""
    for i in range(100):
        merge_json(Path(file), lambda before, key=f"{rank}_{i}": before | {key: True})


def test_writers_of_one_file_wait_for_each_other(tmp_path: Path) -> None:
    """Two processes that add results lose none, and leave no half of a file."""
    on_ranks(2, add_results, str(tmp_path / "results.json"))
    assert len(json.loads((tmp_path / "results.json").read_text())) == 200


def interrupting(number: int) -> Callable[..., None]:
    """An evaluation during which this process gets a signal."""

    def evaluation(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("not interrupted")

    return evaluation


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_measured_before_an_interrupt_is_kept(
    whole: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is printed when it is made, and a sentence says what is missing and how to measure it."""
    (whole / "results.json").unlink(missing_ok=True)
    monkeypatch.setattr(Retrieval, "__call__", interrupting(number))
    with pytest.raises(KeyboardInterrupt):
        evaluated(whole, "eval=[knn,retrieval,duplicates]")
    told = capsys.readouterr().out
    (found,) = json.loads((whole / "results.json").read_text())["last"].items()
    assert found[0] == "knn"
    assert f"knn: k-NN top-1 {found[1]['value']:.2f} %" in told
    assert f"knn kept in {whole / 'results.json'}; retrieval, duplicates not measured" in told
    assert "eval=[retrieval,duplicates]" in told
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interrupt_among_the_baselines_keeps_those_that_were_measured(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The backbone's own results come first."""
    (whole / "results.json").unlink(missing_ok=True)
    monkeypatch.setattr("dino_lite.eval.baselines.untrained", interrupting(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        evaluated(whole, "baselines=true")
    kept = json.loads((whole / "results.json").read_text())["last"]["knn"]
    assert kept["baselines"].keys() == {"raw pixels"}
    told = capsys.readouterr().out
    assert "knn of raw pixels: " in told
    kept = f"knn, knn of raw pixels kept in {whole / 'results.json'}"
    assert f"{kept}; the other baselines not measured (eval=[knn] baselines=true" in told


def test_an_interrupt_before_the_baselines_does_not_forget_them(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that measures the rest asks for them as well."""
    (whole / "results.json").unlink(missing_ok=True)
    monkeypatch.setattr(Retrieval, "__call__", interrupting(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        evaluated(whole, "eval=[knn,retrieval]", "baselines=true")
    rest = "retrieval, baselines not measured (eval=[knn,retrieval] baselines=true does that)."
    assert rest in capsys.readouterr().out
