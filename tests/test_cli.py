"""`dino-lite COMMAND ARGS`: what is quoted, what is run, what is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_lite.config import compose
from dino_lite.errors import UserError
from dino_lite.overrides import parses, quote, quote_override

AWKWARD = [
    "/a b/c",
    "~/photos",
    "é/ü",
    "x=1",
    "(1)",
    "[x]",
    "a,b",
    "1",
    "null",
    "it's",
    "back\\slash",
    "a\\'b",
    "$HOME/x",
    "${x}",
    "end\\",
]


@pytest.mark.parametrize("value", AWKWARD)
def test_root_reaches_the_configuration_as_it_was_typed(value: str) -> None:
    """Whatever a shell can hand over as data.root arrives unchanged (null means none)."""
    config = compose("pretrain", [quote_override(f"data.root={value}")])
    assert config["data"]["root"] == (None if value == "null" else value)


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1))
def test_quoting_loses_no_character(value: str) -> None:
    """Any printable text survives quoting and Hydra's grammar."""
    assert parses(f"data.root={quote(value)}")
    assert compose_root(quote(value)) == value


def compose_root(quoted: str) -> str:
    """What Hydra's grammar and OmegaConf make of a quoted value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    value = OverridesParser.create().parse_overrides([f"key={quoted}"])[0].value()
    return str(OmegaConf.create({"key": value}).key)


@pytest.mark.parametrize(
    "argument",
    [
        "trainer.max_steps=3",
        "eval=[knn]",
        "--multirun",
        "optim.rate=1e-3",
        "+backbone.mlp_ratio=3",
        "~experiment",
        "seed=1,2",
    ],
)
def test_what_hydra_understands_is_left_alone(argument: str) -> None:
    """Numbers, lists, flags, sweeps and deletions keep their meaning."""
    assert quote_override(argument) == argument


def test_values_hydra_cannot_parse_are_quoted() -> None:
    """A value outside the grammar becomes a string instead of an error."""
    assert quote_override("augment.note=a{b") == "augment.note='a{b'"


def test_name_that_looks_like_a_number_stays_a_name() -> None:
    """name=1 names a run 1."""
    assert compose("pretrain", [quote_override("name=007")])["name"] == "007"


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.run(
        [sys.executable, "-c", "from dino_lite.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


def test_unknown_command_names_the_nearest_and_exits_with_2() -> None:
    """A typo in the command is one sentence."""
    result = run("pretrian")
    assert result.returncode == 2
    assert "did you mean pretrain?" in result.stderr
    assert "Traceback" not in result.stderr


def test_version_and_help_need_no_torch() -> None:
    """Help and version answer without importing the heavy packages."""
    code = (
        "import sys; sys.argv = ['dino-lite', '--help']; from dino_lite.cli import main; main(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1]
    )
    assert run("--version").stdout.startswith("dino-lite 0.")


@pytest.mark.slow
def test_stray_module_in_the_users_folder_is_not_imported(tmp_path: Path) -> None:
    """A file timm.py where the user stands does no harm."""
    (tmp_path / "timm.py").write_text("raise SystemExit('the stray timm.py was imported')")
    result = run("pretrain", "data.root=nowhere", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr  # importing says nothing either
    assert "was imported" not in result.stderr + result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["timm.py"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_epoch=3", "did you mean trainer.max_epochs?"),
        ("optm.clip=1", "did you mean optim.clip?"),
        ("data=foldr", "did you mean folder?"),
        ("compat=dinov7", "there is no such choice"),
        ("seed", "did you mean seed=VALUE?"),
        ("losses=[dino]", "did you mean loss?"),
        ("~loss.dyno", "did you mean loss.dino?"),
        # what other overrides choose and add counts, and so does what an experiment does
        ("method=dinov2 method.patch_head.num_prototype=9", "method.patch_head.num_prototypes?"),
        ("loss.koleo.weight.valu=1 experiment=dinov2_shapes", "loss.koleo.weight.value?"),
        ("+loss.variance={_target_:x.Y,gamma:1} loss.variance.gama=1", "loss.variance.gamma?"),
        ("trainer.max_epoch=3 optm.clip=1 ~loss.gram", "did you mean trainer.max_epochs?"),
    ],
)
def test_wrong_override_is_one_sentence_with_the_nearest_name(override: str, words: str) -> None:
    """Unknown keys and choices name what was probably meant, in the configuration that the other
    overrides compose.
    """
    with pytest.raises(UserError) as caught:
        compose("pretrain", override.split())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
