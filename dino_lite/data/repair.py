"""What can be read of files that are damaged outside of their pixels, or lack their end."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
METADATA = (_PNG, _JPEG)  # starts of the formats whose metadata can be left out
_END = b"\xff\xd9"
_PADDING = 1024  # bytes


def start_of(file: Any) -> bytes:
    """The leading bytes, which identify the format."""
    file.seek(0)
    start: bytes = file.read(64)
    file.seek(0)
    return start


def repaired(
    file: Any, truncated: bool, read: Callable[[io.BytesIO], UInt8[np.ndarray, "..."]]
) -> Iterator[tuple[io.BytesIO, bool]]:
    """Versions of a file that could not be read, the best first, and whether to be content with
    part of the pixels; none for most.

    A JPEG that lacks only its end is complete: whatever follows, `read` gives the same pixels. An
    incomplete file is completed only if `truncated` says so.
    """
    file.seek(0)
    content: bytes = file.read()
    if content.startswith(_PNG):
        content = essential_png(content)
        yield io.BytesIO(content), False
    if content.startswith(_JPEG):
        content = essential_jpeg(content)
        yield io.BytesIO(content), False
        content = content.removesuffix(b"\xff")  # half of the end marker
        padded = [content + fill * _PADDING + _END for fill in (b"\0", b"\x55")]
        if has_all_scans(content) and _equal(padded, read):
            yield io.BytesIO(padded[0]), False
        content += _END
    if content.startswith(b"RIFF"):
        num_bytes = int.from_bytes(content[4:8], "little") + 8
        content += bytes(max(0, min(num_bytes, 2**30) - len(content)))
    if truncated:
        yield io.BytesIO(content), True


def _equal(versions: list[bytes], read: Callable[[io.BytesIO], UInt8[np.ndarray, "..."]]) -> bool:
    try:
        one, two = (read(io.BytesIO(version)) for version in versions)
    except Exception:  # neither can be read
        return False
    return np.array_equal(one, two)


def without_metadata(file: Any, error: Exception) -> io.BytesIO:
    """A PNG or JPEG without its metadata. Raises `error` for another format."""
    file.seek(0)
    content: bytes = file.read()
    if content.startswith(_PNG):
        return io.BytesIO(essential_png(content))
    if content.startswith(_JPEG):
        return io.BytesIO(essential_jpeg(content))
    raise error


def essential_png(content: bytes) -> bytes:
    """The chunks that a decoder must know, and intact ones of transparency and EXIF."""
    parts, at = [_PNG], len(_PNG)
    while at + 8 <= len(content):
        size, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        chunk = content[at : at + 12 + size]
        intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and intact):
            parts.append(chunk)
        at += 12 + size
    return b"".join(parts)


def essential_jpeg(content: bytes) -> bytes:
    """Without comments and applications' segments, but for EXIF (1) and Adobe's colors (14)."""
    parts, at = [content[:2]], 2
    while content[at : at + 1] == b"\xff" and at + 4 <= len(content):
        kind, size = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if kind == 0xDA or kind == 0xFF or size < 2:  # the first scan, or no segment
            break
        metadata = kind == 0xFE or (0xE0 <= kind <= 0xEF and kind not in (0xE1, 0xEE))
        if not metadata:
            parts.append(content[at : at + 2 + size])
        at += 2 + size
    return b"".join([*parts, content[at:]])


def has_all_scans(content: bytes) -> bool:
    """Whether a JPEG's scans begin to give every coefficient of every component to its last bit:
    a progressive one without its last scans shows all rows, but not all that there was.
    """
    frame = re.search(rb"(?s)\xff[\xc0-\xc2]..\x08....(.)", content)
    left: dict[int, int] = {}  # coefficients by component
    for match in re.finditer(rb"(?s)\xff\xda..([\x01-\x04])", content):
        num, at = match[1][0], match.end()
        scan = content[at : at + 2 * num + 3]
        if len(scan) < 2 * num + 3:
            break
        first, last, bits = scan[2 * num :]
        if bits & 15 == 0:
            for component in scan[: 2 * num : 2]:
                left[component] = left.get(component, 64) - (last - first + 1)
    return frame is not None and len(left) >= frame[1][0] and all(n <= 0 for n in left.values())
