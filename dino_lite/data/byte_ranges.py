"""Byte ranges of local files or URLs that fsspec supports (s3://, gs://, https:// …)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from dino_lite.contracts import UserError
from dino_lite.data.remote import Remote
from dino_lite.data.roots import is_url

_NUM_TRIES = 3  # an image whose only attempt failed would count as bad
_WAIT_SECONDS = 0.2
_STAMPS = ("ETag", "etag", "LastModified", "Last-Modified", "mtime")  # by file system
_FINAL = (FileNotFoundError, PermissionError)  # not retried


class Range(NamedTuple):
    """`size` bytes from offset `start` of the file `place`, a path or a URL."""

    place: str
    start: int
    size: int


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Do not store it: fsspec caches file systems itself and makes a new one after a fork, where the
    parent's connections and threads are unusable.
    """
    from fsspec.core import url_to_fs

    Remote().check(url.partition("://")[0])
    found: tuple[Any, str] = url_to_fs(url)
    return found


def read_range(wanted: Range) -> bytes:
    """The bytes of one range. Raises OSError if they cannot be read or are too few."""
    found = read_ranges([wanted])[0]
    if isinstance(found, OSError):
        raise found
    return found


def read_ranges(wanted: Sequence[Range]) -> list[bytes | OSError]:
    """The bytes of each range, or the error that prevented it. URLs are fetched concurrently."""
    remote = [i for i, item in enumerate(wanted) if is_url(item.place)]
    if not remote:
        return [_read_local(item) for item in wanted]
    found = [OSError("not requested") if is_url(w.place) else _read_local(w) for w in wanted]
    for attempt in range(_NUM_TRIES):
        time.sleep(attempt * _WAIT_SECONDS)
        for i, answer in zip(remote, _read_remote([wanted[i] for i in remote]), strict=True):
            found[i] = answer
        remote = [i for i in remote if not isinstance(found[i], (bytes, *_FINAL))]
        if not remote:
            break
    return found


def _read_local(wanted: Range) -> bytes | OSError:
    try:
        with open(wanted.place, "rb", buffering=0) as file:
            file.seek(wanted.start)
            return _whole(file.read(wanted.size), wanted)
    except OSError as error:
        return error


def _read_remote(wanted: Sequence[Range]) -> list[bytes | OSError]:
    opened = [filesystem(item.place) for item in wanted]
    starts = [item.start for item in wanted]
    ends = [item.start + item.size for item in wanted]
    try:
        answers = opened[0][0].cat_ranges(
            [path for _, path in opened], starts, ends, on_error="return"
        )
    except Exception as error:  # any exception of the protocol's package
        answers = [error] * len(wanted)
    return [
        _whole(answer, item)
        if isinstance(answer, bytes)
        else next((kind for kind in _FINAL if isinstance(answer, kind)), OSError)(
            f"{item.place}: {type(answer).__name__}: {answer}"
        )
        for answer, item in zip(answers, wanted, strict=True)
    ]


def _whole(data: bytes, wanted: Range) -> bytes | OSError:
    """Fewer bytes: the file was truncated; more: the web server ignored the range."""
    if len(data) == wanted.size:
        return data
    return OSError(
        f"{wanted.place} gave {len(data)} bytes, not the {wanted.size} from {wanted.start} on"
    )


def versions(places: Sequence[str]) -> list[tuple[int, str]]:
    """Size in bytes of each file, and a stamp that changes when it is rewritten ("": unknown).

    Raises UserError if a file does not exist.
    """
    if not any(map(is_url, places)):
        return [_local_version(place) for place in places]
    found = []
    folders: dict[str, dict[str, Any]] = {}
    for place in places:
        fs, path = filesystem(place)
        folder = path.rpartition("/")[0]
        if folder not in folders:
            folders[folder] = _listed(fs, folder)
        info = folders[folder].get(path) or _info(fs, path, place)
        stamp = next((info[key] for key in _STAMPS if info.get(key)), "")
        found.append((int(info["size"]), str(stamp)))
    return found


def _local_version(place: str) -> tuple[int, str]:
    try:
        status = os.stat(place)
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror}): check data.root.") from error
    return status.st_size, str(status.st_mtime_ns)


def _listed(fs: Any, folder: str) -> dict[str, Any]:
    """Entries of a folder by path, from a single request instead of one per file. Empty for web
    servers, whose listings have no sizes.
    """
    try:
        entries = fs.ls(folder, detail=True)
    except Exception:  # reading may be allowed without listing
        return {}
    return {entry["name"]: entry for entry in entries if entry.get("size")}


def _info(fs: Any, path: str, place: str) -> Any:
    try:
        info = fs.info(path)
        if info.get("size") is None:
            raise OSError("the server does not report its size")
    except Exception as error:
        raise UserError(
            f"{place} cannot be read ({type(error).__name__}: {error}): check data.root and your "
            "access to it."
        ) from error
    return info


def names_below(root: str, suffix: str) -> list[str]:
    """Files below the folder `root` that end in `suffix`, relative to it, sorted, without hidden
    ones.

    Raises UserError if it cannot be listed.
    """
    return sorted(name for name in _files_below(root) if name.lower().endswith(suffix))


def _files_below(root: str) -> Iterator[str]:
    if not is_url(root):
        for folder, below, files in os.walk(root, followlinks=True):
            below[:] = [name for name in below if not name.startswith(".")]
            inside = os.path.relpath(folder, root).replace(os.sep, "/")
            for name in files:
                if not name.startswith("."):
                    yield name if inside == "." else f"{inside}/{name}"
        return
    fs, path = filesystem(root)
    try:
        found = fs.find(path)
    except Exception as error:
        raise UserError(
            f"{root} cannot be listed ({type(error).__name__}: {error}): check it, or name its "
            "files, as in train-{000..146}.tar."
        ) from error
    for name in found:
        yield name[len(path.rstrip("/")) + 1 :]


def expand_braces(pattern: str) -> list[str]:
    """All names a pattern stands for: `{000..146}` counts, `{a,b}` lists, both may be nested."""
    if "{" not in pattern:
        return [pattern]
    start, depth = pattern.index("{"), 0
    cuts = [start]  # braces and commas of the first outermost pair
    for i in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[i], 0)
        if depth == 0 or (depth == 1 and pattern[i] == ","):
            cuts.append(i)
        if depth == 0:
            break
    if depth:
        return [pattern]
    inside = pattern[start + 1 : cuts[-1]]
    count = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if count:
        first, last = int(count[1]), int(count[2])
        digits = len(count[1]) if count[1].startswith("0") else 0
        choices = [f"{i:0{digits}d}" for i in range(first, last + 1)]
    else:
        choices = [pattern[a + 1 : b] for a, b in pairwise(cuts)]
        choices = [name for choice in choices for name in expand_braces(choice)]
    ends = expand_braces(pattern[cuts[-1] + 1 :])
    return [pattern[:start] + choice + end for choice in choices for end in ends]
