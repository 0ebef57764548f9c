"""A run's name depends on what was asked for, and on nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dino_lite.config import Config, compose, put
from dino_lite.contracts import UserError
from dino_lite.runs import identity
from dino_lite.runs.identity import changed_from_defaults, requested, run_name
from dino_lite.runs.run import merge_json, read_json
from test_plan import facts


def changed(*overrides: str) -> Config:
    return changed_from_defaults(requested(compose("pretrain", list(overrides))))


def name_of(config: Config) -> str:
    chosen = put(config, "backbone.name", "vit")
    return run_name(chosen, requested(config), facts(source="shapes"))


def test_a_bare_run_differs_in_nothing() -> None:
    """Nor does one that repeats a default, or turns a knob that changes no weight."""
    assert changed() == changed("seed=0", "loader.num_workers=7", "trainer.memory=low") == {}
    assert changed("name=x", "runs_dir=elsewhere", "callbacks.online_eval=null") == {}


def test_what_was_asked_for_is_what_differs() -> None:
    """Values, nodes of another class, keys that were added, nodes that were removed."""
    assert changed("optim.clip=1.5") == {"optim.clip": 1.5}
    other = changed("backbone=convnet")
    assert other["backbone._target_"].endswith(".ConvNet")
    assert "backbone.embed_dim" not in other  # that class has no such key
    assert changed("~loss.dino", "+loss.mine.weight=2") == {
        "loss.dino": "(absent)",
        "loss.mine.weight": 2,
    }


@pytest.mark.slow
def test_a_new_default_key_keeps_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command finds its run after an update that adds a key with a default."""
    for words in ([], ["optim.clip=1.5"], ["backbone=convnet"], ["~loss.dino"]):
        config = compose("pretrain", words)
        before = name_of(config)
        grown = put(config, "optim.invented", 3)
        if "loss" in config and "dino" in config["loss"]:
            grown = put(grown, "loss.dino.invented", 3)
        if words != ["backbone=convnet"]:
            grown = put(grown, "backbone.invented", 3)
        bare = requested(compose("pretrain", []))
        bare |= dict.fromkeys(("optim.invented", "loss.dino.invented", "backbone.invented"), 3)
        with monkeypatch.context() as patch:
            patch.setattr(identity, "defaults", lambda command, bare=bare: bare)
            assert name_of(grown) == before


@pytest.mark.parametrize(
    "choice", ["method=dinov2", "method=dinov3", "backbone=convnet", "loss=[dino,koleo]"]
)
def test_a_new_default_key_of_another_choice_keeps_the_name(choice: str) -> None:
    """Where the file of that choice repeats the constructor's default, as a new key does."""
    config = compose("pretrain", [choice])
    bare, request = identity.defaults(), requested(config)
    repeated = [key for key in request.keys() - bare.keys() if key not in changed(choice)]
    assert repeated
    for key in repeated:
        older = {other: value for other, value in request.items() if other != key}
        assert changed_from_defaults(older) == changed_from_defaults(request)


@pytest.mark.parametrize(
    "override", ["seed=1", "optim.clip=1.5", "~loss.dino", "backbone=convnet", "method=dinov2"]
)
def test_what_changes_the_weights_changes_the_name(override: str) -> None:
    """Each request has a hash of its own."""
    other = compose("pretrain", [override])
    assert name_of(other).rpartition("_")[2] != name_of(compose("pretrain", [])).rpartition("_")[2]


def test_the_order_of_overrides_and_the_machine_do_not_matter(tmp_path: Path) -> None:
    """Nor does the folder that runs lie in."""
    one = compose("pretrain", ["seed=1", "optim.clip=1.5"])
    two = compose("pretrain", ["optim.clip=1.5", "seed=1", f"runs_dir={tmp_path}"])
    assert name_of(one) == name_of(two)


def test_a_group_in_place_of_a_value_is_a_difference() -> None:
    """And a value in place of a group."""
    bare = identity.defaults()
    without = {key: value for key, value in bare.items() if key != "seed"}
    assert changed_from_defaults(without | {"seed.a": 1}) == {"seed.a": 1}
    request = {k: value for k, value in bare.items() if not k.startswith("optim.weight_decay")}
    found = changed_from_defaults(request | {"optim.weight_decay": 0.1})
    assert found["optim.weight_decay"] == 0.1


@pytest.mark.parametrize("letters", ["n" * 245, "図" * 82, "e" * 237 + "é" * 4])
def test_a_long_folder_gives_a_name_that_file_systems_take(letters: str, tmp_path: Path) -> None:
    """Cut between characters, with the hash of the settings and another of what was cut."""
    config = compose("pretrain", ["backbone.name=vit"])
    names = [run_name(config, requested(config), facts(source=letters + end)) for end in "ab"]
    hashed = name_of(config).rpartition("_")[2]
    for name in names:
        assert len(os.fsencode(name)) <= 255
        assert "\ufffd" not in name
        assert name.startswith(f"dino_{letters[:20]}")
        assert name.endswith(f"_vit_{hashed}")
        (tmp_path / name).mkdir()
    assert names[0] != names[1]
    short = run_name(config, requested(config), facts(source="n" * 200))
    assert short == f"dino_{'n' * 200}_vit_{hashed}"


def test_a_name_that_is_too_long_is_one_sentence() -> None:
    """In bytes, as file systems count."""
    with pytest.raises(UserError, match=r"name=図+…: 258 bytes are too long .* at most 255"):
        name_of(compose("pretrain", [f"name={'図' * 86}"]))
    assert name_of(compose("pretrain", [f"name={'図' * 85}"])) == "図" * 85


def test_files_beside_one_with_a_long_name(tmp_path: Path) -> None:
    """A partial file and a lock get shorter names of their own."""
    for letter in "ab":
        path = tmp_path / f"{'n' * 249}{letter}.json"
        merge_json(path, lambda before, letter=letter: before | {letter: 1})  # type: ignore[misc]
        merge_json(path, lambda before: before | {"again": 2})
        assert read_json(path) == {letter: 1, "again": 2}
    assert len(list(tmp_path.iterdir())) == 4  # and two locks
