"""`dino-lite COMMAND ARGS`: what is quoted, what is run, what is said."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hypothesis import given
from hypothesis import strategies as st

import dino_lite
from dino_lite.cli import COMMANDS, main
from dino_lite.config import Config, command, compose, config_dir
from dino_lite.errors import Interrupted, UserError
from dino_lite.overrides import parses, quote, quote_override
from dino_lite.settings.words import as_overrides
from dino_lite.sweep import Sweep

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


WITHOUT_TORCH = """
import sys
from contextlib import suppress
from dino_lite.cli import main
for line in sys.argv[1:]:
    sys.argv = ["dino-lite", *line.split()]
    with suppress(SystemExit):
        main()
assert not {"torch", "timm", "pytorch_lightning"} & {*sys.modules}
"""


def test_what_needs_no_torch_imports_none() -> None:
    """Help, version, settings, completion, and the refusal of a wrong command or key."""
    lines = ["--help", "--version", "pretrian", "pretrain --help", "report --cfg job"]
    lines += ["check -sc install=bash", "evaluate optm.clip=1", "pretrain --flag"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *lines],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\ndino-lite 0." in done.stdout
    said = done.stderr.splitlines()
    assert "did you mean pretrain?" in said[0]
    assert "optm.clip: there is no such key" in said[1]
    assert "--flag: there is no such flag" in said[2]
    assert len(said) == 3


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """`dino-lite WORDS` in this process, for what ends before the command is executed."""
    monkeypatch.setattr(sys, "argv", ["dino-lite", *words])
    main()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does_with_examples_that_compose(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own keys and choices, and how to see all settings."""
    call(monkeypatch, name, "--help")
    text = capsys.readouterr().out
    assert text.startswith(f"dino-lite {name}: ")
    assert "--cfg job" in text
    assert "Hydra" not in text.splitlines()[0]
    assert ("knn, linear" in text) == (name in ("evaluate", "compare"))  # the choices of eval
    examples = re.findall(rf"^  dino-lite {name}(.*?)(?:   |$)", text, re.MULTILINE)
    assert examples
    lines = [as_overrides(name, shlex.split(example), config_dir()) for example in examples]
    compose(name, [word for line in lines for word in line])


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ("pretrain --cfg=job --package=seed seed=3", "3"),
        ("pretrain seed=3 -c job -p seed", "3"),
        ("pretrain runs_dir=a --cfg job name=b=c --package name", "b=c"),
        ("pretrain --config-dir={folder} -c job -p optim.clip optim=mine", "7"),
        ("pretrain -cd={folder} -c job -p optim.clip optim=mine", "7"),
    ],
)
def test_flags_stand_anywhere_with_and_without_an_equals_sign(
    words: str,
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And are not taken for settings, whatever the folder is called."""
    folder = tmp_path / "a=b"
    (folder / "optim").mkdir(parents=True)
    (folder / "optim" / "mine.yaml").write_text("defaults: [adamw, _self_]\nclip: 7\n")
    call(monkeypatch, *(word.format(folder=folder) for word in words.split()))
    assert capsys.readouterr().out.strip() == printed


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("dino-lite pre", "pretrain"),
        ("dino-lite pretrain trainer.max_t", "trainer.max_time="),
        ("dino-lite evaluate eval=fine", "eval=finetune"),
        ("dino-lite evaluate seed=1 runs_", "runs_dir="),
        ("dino-lite nonsense a", ""),
    ],
)
def test_tab_completes_commands_keys_and_choices(
    line: str,
    completed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the shell asks, after what `-sc install=bash` prints was evaluated."""
    monkeypatch.setenv("COMP_LINE", line)
    with suppress(SystemExit):
        call(monkeypatch, "-sc", "query=bash")
    assert capsys.readouterr().out.strip() == completed


def sweep(
    monkeypatch: pytest.MonkeyPatch, folder: Path, job: Callable[[Config], None], *words: str
) -> int:
    """The exit code of `report --multirun WORDS` whose jobs do `job`."""
    words = ("report", "--multirun", f"runs_dir={folder}", *words)
    monkeypatch.setattr(sys, "argv", [*words])
    try:
        command("report")(job)()
    except SystemExit as end:
        return int(str(end.code))
    return 0


def test_a_failed_job_does_not_end_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the failure, the others run; the failed are named at the end by what differs, with
    their reasons, and the exit code is 1.
    """
    failures = {
        "a": UserError("a: it is wrong."),
        "b": ZeroDivisionError("by zero"),
        "c": OSError(errno.ENOSPC, "No space left on device", "file"),
        "d": SystemExit(1),
    }
    ran = []

    def job(config: Config) -> None:
        ran.append(config["checkpoint"])
        if ran[-1] in failures:
            raise failures[ran[-1]]

    assert sweep(monkeypatch, tmp_path, job, "checkpoint=a,b,c,d,e", "draw=false") == 1
    assert ran == [*"abcde"]
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1
    assert said.splitlines()[-5:] == [
        "4 of 5 jobs failed:",
        "  job 1 (checkpoint=a): a: it is wrong.",
        "  job 2 (checkpoint=b): ZeroDivisionError: by zero",
        "  job 3 (checkpoint=c): file: No space left on device.",
        "  job 4 (checkpoint=d): exit code 1",
    ]


def test_paths_and_names_are_swept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also alone; a path with a comma that exists is one."""
    monkeypatch.chdir(tmp_path)
    for name in ("a b", "c", "d,e"):
        (tmp_path / name).mkdir()
    seen: list[str] = []

    def job(config: Config) -> None:
        seen.append(config["checkpoint"])

    for words in (["a b,c"], ["checkpoint=a b,c"], ["checkpoint=d,e", "draw=true,false"]):
        assert sweep(monkeypatch, tmp_path, job, *words) == 0
    assert seen == ["a b", "c", "a b", "c", "d,e", "d,e"]
    assert "job 1: runs_dir=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pretrain --shell-completion", "takes install=SHELL, uninstall=SHELL or query=SHELL, wi"),
        ("report -sc install=fosh", "with bash, fish or zsh, as in: eval "),
        ("report --multirun --cfg job", "--info and --shell-completion exclude each o"),
    ],
)
def test_flags_that_print_are_refused_in_a_sentence(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where Hydra itself shows a traceback."""
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, *words.split())
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert said in told
    assert told.count("\n") == 1


def test_an_interrupt_ends_the_whole_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C and signals, also where training turns them into a sentence; what failed is named."""
    for end in (Interrupted("stopped."), SystemExit(143), KeyboardInterrupt()):
        with pytest.raises(type(end)), Sweep().job(["seed=1"]):
            raise end
    failures = [UserError("it is wrong."), KeyboardInterrupt()]

    def job(config: Config) -> None:
        raise failures.pop(0)

    assert sweep(monkeypatch, tmp_path, job, "checkpoint=a,b,c") == 130
    assert capsys.readouterr().err.endswith("  job 1 (checkpoint=a): it is wrong.\n")
    assert failures == []


def test_a_wrong_key_of_one_job_ends_a_sweep_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one sentence."""
    assert sweep(monkeypatch, tmp_path, print, "draw=true,false", "drawn=1") == 2
    assert "did you mean draw?" in capsys.readouterr().err


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


def test_a_program_that_uses_hydra_itself_is_not_disturbed(tmp_path: Path) -> None:
    """What it has initialized is there again after a call, and after an error."""
    (tmp_path / "app.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), job_name="mine", version_base="1.2"):
        theirs = GlobalHydra.instance()
        assert compose("pretrain", ["seed=3"])["seed"] == 3
        with pytest.raises(UserError):
            compose("pretrain", ["sed=3"])
        with pytest.raises(UserError):
            dino_lite.evaluate("checkpoint=absent")
        assert GlobalHydra.instance() is theirs
        assert hydra.compose("app").a == 1
        assert str(hydra.version.getbase()) == "1.2"
        assert JobRuntime.instance().get("name") == "mine"
    assert not GlobalHydra.instance().is_initialized()
