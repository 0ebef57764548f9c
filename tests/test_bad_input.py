"""What users get wrong: one clear sentence each, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_lite.commands.evaluate import run_evaluate
from dino_lite.config import compose
from dino_lite.contracts import UserError
from ranks import command
from tiny import photos, tiny, train


def listing(folder: Path) -> set[Path]:
    """Everything below a folder."""
    return set(folder.rglob("*"))


def refused(tmp_path: Path, *overrides: str, data: str = "auto") -> str:
    """The sentence with which a run is refused; nothing may be written."""
    before = listing(tmp_path)
    with pytest.raises(UserError) as caught:
        train(tmp_path / "runs", *overrides, data=data)
    assert listing(tmp_path) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_path(tmp_path: Path) -> None:
    """A folder that is not there is named."""
    assert "nowhere" in refused(tmp_path, f"data.root={tmp_path / 'nowhere'}")


def test_empty_folder(tmp_path: Path) -> None:
    """A folder without a file is named."""
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path, f"data.root={tmp_path / 'empty'}")


def test_folder_without_one_readable_image(tmp_path: Path) -> None:
    """Files that only look like images are not enough."""
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.jpg").write_bytes(b"no image")
    assert "broken" in refused(tmp_path, f"data.root={tmp_path / 'broken'}")


def test_one_class(tmp_path: Path) -> None:
    """Labels that were asked for need two classes."""
    data = photos(tmp_path / "data", [f"cat/{i}.png" for i in range(4)])
    assert "class" in refused(tmp_path, f"data.root={data}", "data.labels=folder", data="folder")


@pytest.mark.parametrize(
    "override",
    [
        "augment.global_size=0",
        "augment.num_local=-1",
        "backbone.patch_size=64",
        "loss.dino.student_temp=-1",
        "method.teacher_temp.end=-1",
        "optim.learning_rate.warmup=2",
        "backbone.name=resnet50",
        "data.image_size=0",
        "backbone.pretrained=/nowhere",
        "loader.max_bad_fraction=2",
        "trainer.devices=0",
        "name=a/b",
    ],
)
def test_impossible_values(tmp_path: Path, override: str) -> None:
    """Each is refused before anything is written, and named."""
    key = override.partition("=")[0]
    sentence = refused(tmp_path, override, data="shapes")
    assert key.rpartition(".")[2] in sentence or key in sentence


@pytest.mark.slow
def test_command_line_exits_with_2_and_one_sentence(tmp_path: Path) -> None:
    """No traceback, no file, no partial run."""
    for arguments in (["data.root=nowhere"], ["trainer.max_epoch=3"]):
        result = command("pretrain", *arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert not listing(tmp_path)


def test_corrupt_images_are_replaced_counted_and_listed(tmp_path: Path) -> None:
    """A run goes on past a broken file and names it in bad_files.csv."""
    data = photos(tmp_path / "data", [f"{i}.png" for i in range(15)])
    (data / "torn.png").write_bytes((data / "3.png").read_bytes()[:200])
    folder = train(
        tmp_path / "runs", f"data.root={data}", "loader.max_bad_fraction=0.1", data="folder"
    )
    assert "torn.png" in (folder / "bad_files.csv").read_text()


def test_too_many_corrupt_images_stop_the_run(tmp_path: Path) -> None:
    """Above loader.max_bad_fraction the run stops and says so."""
    data = photos(tmp_path / "data", [f"{i}.png" for i in range(6)])
    for i in range(4):
        (data / f"torn{i}.png").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"loader\.max_bad_fraction"):
        train(tmp_path / "runs", f"data.root={data}", data="folder")


def test_evaluation_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    """Nothing, latest without a run, and a file that is no checkpoint are told apart."""
    (tmp_path / "file.ckpt").write_bytes(b"no checkpoint")
    for chosen, words in (
        (None, "missing"),
        ("latest", "contains no run with a checkpoint"),
        ("gone", "is not a run"),
    ):
        arguments = [f"runs_dir={tmp_path}"] + ([] if chosen is None else [f"checkpoint={chosen}"])
        with pytest.raises(UserError, match=words):
            run_evaluate(compose("evaluate", arguments))


def test_k_nn_needs_labels(tmp_path: Path) -> None:
    """Evaluating on unlabeled images is refused."""
    run = train(tmp_path / "runs", "trainer.max_steps=2")
    data = photos(tmp_path / "data", [f"{i}.png" for i in range(4)])
    with pytest.raises(UserError, match="labels"):
        run_evaluate(compose("evaluate", [f"checkpoint={run}", f"data.root={data}"]))


def test_tiny_configuration_is_what_the_tests_think(tmp_path: Path) -> None:
    """The shared tiny run keeps its own runs folder."""
    assert tiny(tmp_path)["runs_dir"] == str(tmp_path)
