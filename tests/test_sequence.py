"""A run made of stages: order, settled values, resume at any moment, ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_lite.commands.report import report
from dino_lite.commands.runs import runs
from dino_lite.config import Config, load
from dino_lite.contracts import Interrupted, UserError
from dino_lite.interrupts import Interrupt
from dino_lite.planning.checks import check_values
from dino_lite.runs.checkpoint import find_checkpoint
from dino_lite.runs.run import Run
from dino_lite.runs.sequence import Sequence, Stage
from tiny import checkpoint, tiny

After = Callable[[Run], dict[str, Any]]


def two_stages(
    runs_dir: Path, *overrides: str, name: str = "two", after: After | None = None
) -> tuple[Sequence, list[Stage]]:
    """A sequence of two tiny stages; the second begins with the backbone of the first."""
    options = ("trainer.max_steps=4", "augment.global_size=auto", f"name={name}", *overrides)
    config = check_values(tiny(runs_dir, *options))
    sequence = Sequence("pretrain", config, "shapes")
    larger = config["data"] | {"image_size": 64}
    start = config["backbone"] | {"pretrained": sequence.result_of("01_a")}
    second = config | {"backbone": start, "data": larger}
    return sequence, [
        Stage("01_a", config, "scratch", after=after),
        Stage("02_b", second, "01_a", "itself", after=after),
    ]


def go(*given: Any, **named: Any) -> dict[str, Any]:
    """Run it."""
    sequence, stages = two_stages(*given, **named)
    return sequence.run(stages)


def steps_of(run: Run) -> dict[str, Any]:
    """What follows a stage here: its steps."""
    return {"steps": run.results()["steps"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted sequence."""
    folder = tmp_path_factory.mktemp("whole")
    return Path(go(folder, after=steps_of)["run"])


def same(one: Path, other: Path) -> bool:
    """Whether both stages have the same weights."""
    return all(
        torch.equal(value, checkpoint(other / stage)["state_dict"][name])
        for stage in ("01_a", "02_b")
        for name, value in checkpoint(one / stage)["state_dict"].items()
    )


def test_each_stage_is_a_run_and_begins_with_the_former_result(whole: Path) -> None:
    assert find_checkpoint(str(whole), "").path == whole / "02_b" / "checkpoints" / "last.ckpt"
    begun = load(whole / "02_b" / "config.yaml")["backbone"]["pretrained"]
    assert begun == str(whole / "01_a" / "checkpoints" / "last.ckpt")
    assert [Run(whole / name).results()["finished"] for name in ("01_a", "02_b")] == [True, True]


def test_sizes_and_normalization_are_settled_by_the_first_stage(whole: Path) -> None:
    """The images of the second are larger."""
    first, second = (load(whole / name / "config.yaml") for name in ("01_a", "02_b"))
    assert second["data"]["image_size"] == 64
    assert first["augment"] == second["augment"]
    assert (first["augment"]["global_size"], first["preset"]) == (32, 44)
    assert first["normalize"] == second["normalize"]


def test_the_same_command_says_that_it_is_finished(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(run: Run) -> dict[str, Any]:
        raise AssertionError

    before = checkpoint(whole / "02_b")["global_step"]
    results = go(whole.parent, after=never)
    assert f"{whole} is finished" in capsys.readouterr().out
    assert results["stages"] == {"01_a": {"steps": 4}, "02_b": {"steps": 4}}
    assert checkpoint(whole / "02_b")["global_step"] == before


def test_another_request_is_refused_with_its_key(whole: Path) -> None:
    with pytest.raises(UserError, match=r"two was started with seed=0, not 1: give the same"):
        go(whole.parent, "seed=1")


@pytest.mark.slow
def test_a_kill_inside_a_stage_and_one_between_stages_change_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = "callbacks.stop={_target_: tiny.StopAt, step: 2}"
    with pytest.raises(Interrupted, match=r"01_a was interrupted; .* after step 2"):
        go(tmp_path, stop)
    with pytest.raises(UserError, match=r"two has no finished stage yet: .*01_a, the stage"):
        find_checkpoint("two", tmp_path)

    def interrupted(run: Run) -> dict[str, Any]:
        raise Interrupt

    with pytest.raises(Interrupted, match=r"two was interrupted; .* go on with 01_a\."):
        go(tmp_path, after=interrupted)
    assert not (tmp_path / "two" / "02_b").exists()
    capsys.readouterr()
    results = go(tmp_path, after=steps_of)
    assert "01_a   scratch      itself" in capsys.readouterr().out
    assert results["stages"] == {"01_a": {"steps": 4}, "02_b": {"steps": 4}}
    assert same(whole, tmp_path / "two")


def test_an_error_in_the_second_stage_leaves_the_first_as_the_result(tmp_path: Path) -> None:
    def once(run: Run) -> dict[str, Any]:
        if run.folder.name == "02_b":
            raise UserError("no.")
        return {}

    with pytest.raises(UserError, match=r"^no\.$"):
        go(tmp_path, "trainer.max_steps=2", after=once)
    found = find_checkpoint("two", tmp_path)
    assert found.path == tmp_path / "two" / "01_a" / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match="contains no run with a checkpoint"):
        find_checkpoint("latest", tmp_path)
    assert [(run["name"], run["state"]) for run in runs(f"runs_dir={tmp_path}")] == [
        ("two", "2 of 2"),
        ("two/01_a", "finished"),
        ("two/02_b", "finished"),
    ]


def test_another_process_that_trains_it_is_waited_for(whole: Path, tmp_path: Path) -> None:
    sequence, stages = two_stages(tmp_path)
    with sequence._locked(), pytest.raises(UserError, match="by another process: wait for it"):
        sequence.run(stages)


def test_latest_and_the_list_see_the_sequence(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_checkpoint("latest", whole.parent) == find_checkpoint("two", whole.parent)
    listed = runs(f"runs_dir={whole.parent}")
    assert [(run["name"], run["state"], run["steps"]) for run in listed] == [
        ("two", "finished", 8),
        ("two/01_a", "finished", 4),
        ("two/02_b", "finished", 4),
    ]
    assert "two/01_a  finished  dino" in capsys.readouterr().out


def test_the_report_tells_all_stages(whole: Path) -> None:
    path = report(f"checkpoint={whole}", "draw=false")
    text = path.read_text(encoding="utf-8")
    assert path == whole / "report.html"
    for told in ('id="01_a"', 'id="02_b"', "starts from", "scratch", ">finished<", "Loss"):
        assert told in text
    assert text.count('class="pictures"') == 2


@pytest.mark.parametrize("damage", ["{", "{}", '{"stages": []}'])
def test_a_damaged_file_is_a_sentence(tmp_path: Path, damage: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "sequence.json").write_text(damage)
    with pytest.raises(UserError, match=r"sequence\.json"):
        find_checkpoint("bad", tmp_path)
    assert [run["state"] for run in runs(f"runs_dir={tmp_path}")] == ["damaged"]


def named(config: Config, value: str) -> Config:
    """`config` with another name."""
    return config | {"name": value}


def test_the_name_follows_from_what_differs_from_the_defaults(tmp_path: Path) -> None:
    config = check_values(tiny(tmp_path, "name=auto"))
    folders = [
        Sequence("pretrain", each, "my set").folder.name
        for each in (config, config | {"plan": "full"}, config | {"seed": 1})
    ]
    assert folders[0] == folders[1] != folders[2]
    assert folders[0].startswith("pretrain_my-set_")
    with pytest.raises(UserError, match="name=a/b: must be the name of a folder"):
        Sequence("pretrain", named(config, "a/b"), "x")
