"""Removes from a description what tells of the machine it was made on: folders and hosts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_OF_PATHS = (
    *("root", "runs_dir", "checkpoint", "pretrained", "labels", "out"),
    *("base", "features_dir", "pack", "pictures"),
)
_WORD = re.compile(r"[~+]*([\w.@/]+)=(.*)", re.DOTALL)  # an override
_PATH = re.compile(
    r"(?<![\w.:/\\~-])(?:\w+://|~|\$\w+|[A-Za-z]:(?=[/\\]))?[/\\]*[/\\][^\s,;'\"\[\]()]*"
)


def portable(value: Any, key: str = "") -> Any:
    """Plain JSON with all paths and URLs reduced to their last part; `key` is the setting's."""
    if isinstance(value, dict):
        return {name: portable(each, str(name)) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [portable(each, key) for each in value]
    if not isinstance(value, str):
        return value
    if key == "overrides" and (word := _WORD.fullmatch(value)):
        return value[: word.start(2)] + portable(word[2], word[1].rpartition(".")[2])
    if key.rpartition(".")[2] in _OF_PATHS:
        parts = value.strip("[]'\"").split(",") if key != value else [value]
        return ",".join(last_part(part.strip(" '\"")) for part in parts)
    return _PATH.sub(lambda path: last_part(path[0]), value)


def last_part(path: str | Path) -> str:
    """The last part of a path or URL, without a query; "~" for the home folder."""
    text = re.sub(r"^\w+://[^/]*|[?#].*$", "", str(path))
    if str(path).startswith(("~", "/")) and Path(text).expanduser() == Path.home():
        return "~"
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or "/"
