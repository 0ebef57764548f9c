"""A path alone on the command line: which setting it is, and what is said if it is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_lite import config
from dino_lite.cli import main as dino_lite
from dino_lite.config import arguments_of, compose, config_dir
from dino_lite.contracts import UserError
from dino_lite.data.roots import several
from dino_lite.settings.words import MAIN, as_overrides


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with odd names in it, which are also keys or lists by their form."""
    for name in ("photos", "seed=1", "my photos=2020", "é=ü", "a,b", "[x]", "runs/dino_x_1"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def translated(command: str, *words: str) -> list[str]:
    return as_overrides(command, words, config_dir())


@pytest.mark.parametrize(
    "path",
    [
        *("photos", "my photos=2020", "é=ü", "a,b", "[x]", ".", "..", "~", "~/a=b", "./seed=1"),
        *("/no/such/folder", "nowhere/else", "list.csv", "photos/*.png", "C:\\photos"),
        *("https://host/list.csv?a=b&c", "s3://bucket/list.csv"),
    ],
)
def test_a_path_alone_is_the_data_of_a_run_as_it_was_typed(path: str) -> None:
    """Existing or not, relative, with = or a list's signs, a pattern, a URL; in Python as well,
    where a command of few settings stands for all.
    """
    assert compose("runs", [path])["runs_dir"] == path
    assert translated("check", "seed=1", path) == ["seed=1", f"data.root={path}"]


@pytest.mark.parametrize(
    "word",
    ["seed=1", "~callbacks.online_eval", "+data.x=3", "data.root=~/a", "eval=[knn]", "~experiment"],
)
def test_what_is_for_hydra_stays(word: str) -> None:
    """Also where a folder of that name exists (seed=1), as sweeps make them."""
    assert translated("pretrain", word) == [word]


@pytest.mark.parametrize("command", ["evaluate", "report", "export", "embed"])
@pytest.mark.parametrize(
    "word", ["latest", "dino_x_1", "runs/dino_x_1", "photos", "a.ckpt", "timm:resnet18"]
)
def test_a_word_alone_is_the_checkpoint_where_one_is_asked_for(command: str, word: str) -> None:
    """A path, `latest`, a run's name, a model of timm."""
    assert translated(command, word) == [f"checkpoint={word}"]


def test_several_paths_are_a_list_where_a_list_is_understood() -> None:
    """The folders of a run, also one with a comma; the checkpoints of a comparison."""
    root = compose("pretrain", ["photos", "a,b", "it's/here"])["data"]["root"]
    assert several(root) == ["photos", "a,b", "it's/here"]
    assert several("[ a, 'b' ]") == ["a", "b"]
    assert translated("compare", "latest", "dino_x_1") == ["checkpoints=[latest,dino_x_1]"]
    with pytest.raises(UserError, match=r"one path, its checkpoint; dino-lite compare A B .* data"):
        translated("evaluate", "latest", "photos")


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("pretrain", "phots", "phots: there is no such file or folder; did you mean photos?"),
        ("pretrain", "chekpoint", "did you mean checkpoint=VALUE?"),
        ("pretrain", "vit_small", "did you mean backbone=vit_small?"),
        ("pretrain", "xyzzy", "settings are written KEY=VALUE."),
        ("evaluate", "lastest", "no such run, file or folder; did you mean latest?"),
        ("evaluate", "dino_x_2", "did you mean dino_x_1?"),
        ("evaluate", "runs_dir=photos dino_x_1", "no such run, file or folder"),
        ("pretrain", "photos data.root=x", "photos and data.root=x both set data.root"),
    ],
)
def test_a_word_that_is_no_path_is_answered_with_what_was_meant(
    command: str, words: str, said: str
) -> None:
    """A file nearby, a key, a choice, a run."""
    with pytest.raises(UserError) as caught:
        translated(command, *words.split())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (
            "pretrain",
            "--data ~/photos",
            "data.root=~/photos, or the path alone: dino-lite pretrain ",
        ),
        (
            "pretrain",
            "--data=~/photos",
            "data.root=~/photos, or the path alone: dino-lite pretrain ",
        ),
        ("check", "seed=1 --data-root x", "data.root=x, or the path alone: dino-lite check x."),
        ("pretrain", "-d x", "-d: there is no such flag; settings have no dashes: data.root=x"),
        ("evaluate", "--checkpoint latest", "or the path alone: dino-lite evaluate latest."),
        ("pretrain", "--checkpoint runs/a", "settings have no dashes: checkpoint=runs/a."),
        ("pretrain", "--epochs=3", "trainer.max_epochs=3"),
        ("pretrain", "--batch-size", "loader.batch_size=VALUE"),
        ("evaluate", "--batch-size 3", "dashes: batch_size=3"),
    ],
)
def test_a_flag_that_does_not_exist_is_answered_with_the_setting(
    command: str, arguments: str, said: str
) -> None:
    """As other programs are told where the data lie."""
    with pytest.raises(UserError) as caught:
        arguments_of(command, arguments.split())
    assert said in str(caught.value)


def test_flags_of_hydra_and_paths_stand_in_any_order() -> None:
    """And a translated line is left as it is: launchers run it again."""
    line = arguments_of("pretrain", ["--cfg", "job", "my photos=2020", "--resolve", "seed=1"])
    assert line == ["seed=1", "data.root='my photos=2020'", "--cfg", "job", "--resolve"]
    assert arguments_of("pretrain", line) == line


@pytest.mark.parametrize("value", ["photos", "~/photos", "https://host/a.csv"])
def test_a_path_as_the_kind_of_data_is_answered_with_the_key(value: str) -> None:
    """data=PATH; a choice that is only misspelled keeps its own answer."""
    with pytest.raises(UserError, match=r"write data\.root=") as caught:
        compose("pretrain", [f"data={value}"])
    assert str(caught.value).endswith(f"or the path alone: dino-lite pretrain {value}.")
    with pytest.raises(UserError, match="did you mean pets"):
        compose("pretrain", ["data=petz"])


def test_every_command_with_a_file_has_its_setting() -> None:
    """And that setting exists."""
    primaries = {path.stem for path in config_dir().glob("*.yaml")} - {"base"}
    assert primaries == MAIN.keys()
    for command, key in MAIN.items():
        assert key in dict(config.leaves(compose(command, []))), command


def test_a_path_without_a_command_is_answered_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """dino-lite photos."""
    monkeypatch.setattr("sys.argv", ["dino-lite", "photos"])
    with pytest.raises(SystemExit):
        dino_lite()
    assert "did you mean dino-lite pretrain photos?" in capsys.readouterr().err
