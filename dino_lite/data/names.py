"""Names of files, as long as file systems allow."""

from __future__ import annotations

import hashlib
import os

LONGEST = 255  # bytes, on most file systems


def file_name(text: str, suffix: str = "") -> str:
    """`text` and `suffix` as the name of a file or folder. If that is too long, `text` is cut
    between two characters, and ends in six hex digits of its hash.
    """
    content, room = os.fsencode(text), LONGEST - len(os.fsencode(suffix))
    if len(content) <= room:
        return text + suffix
    mark = f"-{hashlib.sha1(content).hexdigest()[:6]}"
    return content[: room - len(mark)].decode(errors="ignore") + mark + suffix


def safe_name(text: str, kept: str = "-.") -> str:
    """`text` with each character that is no letter, digit or one of `kept` replaced by "-"."""
    return "".join(c if c.isalnum() or c in kept else "-" for c in text) or "data"
