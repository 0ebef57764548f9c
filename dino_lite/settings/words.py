"""Arguments that are not KEY=VALUE: a path alone stands for the command's main setting."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dino_lite.errors import UserError

# The setting that a path alone stands for; those in _LISTS accept several paths.
MAIN = {
    **dict.fromkeys(("pretrain", "check", "adapt", "distill"), "data.root"),
    **dict.fromkeys(("evaluate", "report", "export", "embed"), "checkpoint"),
    "compare": "checkpoints",
    "runs": "runs_dir",
}
_LISTS = ("data.root", "checkpoints")
_KEY = re.compile(r"[+~]{0,2}[\w@:.-]+(/[\w@:.-]+)*")
# What other programs call the data.
_DATA = (
    "d",
    "data",
    "root",
    "data_root",
    "data_dir",
    "data_path",
    "dir",
    "path",
    "images",
    "input",
)


def as_overrides(command: str, words: Sequence[str | os.PathLike[str]], conf: Path) -> list[str]:
    """`words`, the arguments without flags, with paths and names that stand alone replaced by
    KEY=VALUE: `data.root` of pretrain and check (several: a list), `checkpoint` of evaluate.

    A word is a path if it does not have the form KEY=VALUE, or if it exists and no file of `conf`
    has its key. Raises UserError if it is neither a path nor a name that the command knows.
    """
    given = [os.fspath(word) for word in words]
    if command not in MAIN:
        return given
    kept = [word for word in given if _is_override(word, command, conf)]
    paths = [word for word in given if not _is_override(word, command, conf)]
    if not paths:
        return kept
    for path in paths:
        _check_word(path, command, kept, conf)
    key = MAIN[command]
    twice = next((word for word in kept if word.lstrip("+").startswith(f"{key}=")), None)
    if twice is not None:
        raise UserError(f"{paths[0]} and {twice} both set {key}: leave one out.")
    if len(paths) > 1 and key not in _LISTS:
        others = "dino-lite compare A B compares several, and data.root=PATH names other images"
        others = f"; {others}" if key == "checkpoint" else ""
        raise UserError(
            f"{', '.join(paths)}: dino-lite {command} takes one path, its {key}{others}."
        )
    value = paths[0] if len(paths) == 1 else f"[{','.join(map(_listed, paths))}]"
    return [*kept, f"{key}={value}"]


def explain_flag(command: str, flag: str, given: Sequence[str], conf: Path) -> str:
    """One sentence for a flag among the arguments `given` that does not exist, `--data PATH` or
    `--epochs=3`.
    """
    name, _, value = flag.partition("=")
    after = "".join(given[given.index(flag) + 1 :][:1])
    value = value or (after if after and not after.startswith("-") else "VALUE")
    plain = name.lstrip("-").replace("-", "_")
    known = {key.rpartition(".")[2]: key for key in reversed([*_keys(command, conf)])}
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
    key = "data.root" if plain in _DATA else known[near[0]] if near else "KEY"
    alone = f", or the path alone: dino-lite {command} {value}" if key == MAIN[command] else ""
    return f"{name}: there is no such flag; settings have no dashes: {key}={value}{alone}."


def looks_like_path(word: str) -> bool:
    """Whether `word` is a path, URL or pattern by its form, or exists as a file or folder."""
    return re.search(r"[/\\.*?\[\]]|://", word) is not None or word == "~" or _exists(word)


def _exists(word: str) -> bool:
    """Whether there is such a file or folder."""
    return os.path.exists(os.path.expanduser(os.path.expandvars(word)))


def _is_override(word: str, command: str, conf: Path) -> bool:
    """Whether `word` is for Hydra: KEY=VALUE, +KEY=VALUE or ~KEY."""
    key, has_value, _ = word.partition("=")
    if word.startswith(("/", "./", "../", "~/")) or word in (".", "..", "~") or "://" in key:
        return False
    if not has_value:
        return word.startswith(("~", "+")) and not _exists(word)
    if _KEY.fullmatch(key) is None:
        return False
    return not _exists(word) or re.split(r"[./@]", key.lstrip("+~"))[0] in _names(command, conf)


def _check_word(word: str, command: str, kept: list[str], conf: Path) -> None:
    """Raise UserError if `word` is neither a path nor a name that the command knows."""
    names, what = [], "file or folder"
    if MAIN[command].startswith("checkpoint"):
        names, what = ["latest", *_run_names(kept)], "run, file or folder"
    names_timm = names and "timm:" in word
    parts = [word] if _exists(word) else word.split(",")  # several in a sweep
    if names_timm or all(looks_like_path(part) or part in names for part in parts):
        return
    choices = sorted(path.parent.name for path in conf.glob(f"*/{glob.escape(word)}.yaml"))
    groups = _names(command, conf)
    near = difflib.get_close_matches(word, [*names, *sorted(os.listdir())], n=1, cutoff=0.75)
    near = near or [f"{group}={word}" for group in choices if group in groups]
    near = near or [f"{key}=VALUE" for key in difflib.get_close_matches(word, groups, n=1)]
    hint = f"did you mean {' or '.join(near)}?" if near else "settings are written KEY=VALUE."
    raise UserError(f"{word}: there is no such {what}; {hint}")


def _run_names(kept: list[str]) -> list[str]:
    """The folders of runs_dir, as given in `kept` or the default."""
    asked = [word.partition("=")[2].strip("'\"") for word in kept if word.startswith("runs_dir=")]
    folder = Path(os.path.expandvars(asked[-1] if asked else "runs")).expanduser()
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _names(command: str, conf: Path) -> list[str]:
    """The groups and the keys without a group of a command's file and those it starts from."""
    names = ["hydra"]
    for file in [command, *(["pretrain"] if command in ("check", "adapt", "distill") else [])]:
        text = (conf / f"{file}.yaml").read_text(encoding="utf-8")
        names += re.findall(r"^(?:  - )?(\w+):", text, re.MULTILINE)
    return names


def _keys(command: str, conf: Path) -> Iterator[str]:
    """The dotted keys of a command, down to the second level."""
    for name in _names(command, conf):
        if not (conf / name).is_dir():
            yield name
        for path in sorted((conf / name).glob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            yield from (f"{name}.{key}" for key in re.findall(r"^(\w+):", text, re.MULTILINE))


def _listed(path: str) -> str:
    """A path as an element of a list in text."""
    return f"'{path}'" if "," in path else path
