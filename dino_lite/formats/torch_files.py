"""Reads files of torch.save without importing or calling what they name."""

from __future__ import annotations

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from dino_lite.contracts import UserError
from dino_lite.formats.pickles import named_in

_PICKLES = 4  # in files of torch before 1.6: a number, the version, the system, the content
_NAMESPACE = "argparse.Namespace"  # the settings of a training, plain attributes
# A weights file has no use for these, while a malicious one does.
_RUNS = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|importlib|runpy|pty|socket|ctypes|webbrowser|marshal|"
    r"_?pickle|cloudpickle|torch\.(hub|jit))\.|torch\.load$"
    r"|builtins\.(?!(list|dict|set|frozenset|tuple|int|float|str|bytes|bytearray|bool|complex|slice|"
    r"range|object|\w*(Error|Exception|Warning))$)"
)


class _TakesItems(type):
    """Type of `StandIn`, equal to dict: torch's unpickler then lets items be set."""

    def __eq__(cls, other: object) -> bool:
        return other is dict or other is cls

    __hash__ = type.__hash__


class StandIn(list[Any], metaclass=_TakesItems):
    """In place of an object whose class is not imported. Keeps the items set on it, as on a
    dictionary; what it is called with, appended to it or set as its state is dropped.
    """

    num_made = num_weights = 0  # by subclass; weights of those that are modules

    def __new__(cls, *args: object, **keywords: object) -> StandIn:
        made: StandIn = super().__new__(cls)
        made.content = {}
        cls.num_made += 1
        return made

    def __init__(self, *args: object, **keywords: object) -> None:
        self.content: dict[Any, Any]

    def __setstate__(self, state: object) -> None:
        own = state.get("_parameters") if isinstance(state, dict) else None
        type(self).num_weights += len(own) if isinstance(own, dict) else 0

    def __setitem__(self, key: Any, value: Any) -> None:
        self.content[key] = value

    def extend(self, items: object) -> None:
        """Drop the items of a list."""

    append = extend


def load_inert(file: Path, asked: str) -> tuple[Any, dict[str, int]]:
    """The content of a torch.save file, and the classes besides torch's own of its objects, each
    with the number of their weights if they are modules.

    These objects are `StandIn`s: nothing is imported or called. `asked` is the prefix of messages.
    Raises UserError if unpickling would call a function that runs programs, and what torch.load
    raises.
    """
    names = _named(file, asked)
    if dangerous := next(filter(_RUNS.match, sorted(names)), None):
        raise UserError(
            f"{asked} would call {dangerous} when unpickled, which can run any program, so it is "
            "not opened: get the weights from a source that you trust, best as .safetensors."
        )
    names.discard(_NAMESPACE)
    inert: dict[str, Any] = {name: _TakesItems(name, (StandIn,), {}) for name in sorted(names)}
    known: list[Any] = [(each, name) for name, each in inert.items()] + [
        (argparse.Namespace, _NAMESPACE)
    ]
    with torch.serialization.safe_globals(known):
        content = torch.load(file, map_location="cpu", weights_only=True)
    return content, {name: each.num_weights for name, each in inert.items() if each.num_made}


def _named(file: Path, asked: str) -> set[str]:
    """The classes and functions that a torch.save file names, read off its opcodes."""
    with open(file, "rb") as stream:
        if stream.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                name = next(n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl")
                with archive.open(name) as content:
                    found = named_in(content, asked)
        else:
            stream.seek(0)
            found = set()
            for _ in range(_PICKLES):
                found |= named_in(stream, asked)
    return found
