"""Reads JSON files that others may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dino_lite.errors import UserError

_MOST_BYTES = 2**26


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file is missing, not UTF-8 or JSON, larger
    than 64 MiB, nested deeply, or not an object of unequal keys.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES // 2**20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {_NAMES.get(type(content), 'a value')}, not an object")
    except RecursionError:
        raise UserError(f"{path} cannot be read: it is nested too deeply.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    return content


_NAMES = {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return content
