"""Whole files by URL through fsspec: s3://, gs://, https:// and others."""

from __future__ import annotations

import io
import os
import re
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dino_lite.contracts import UserError
from dino_lite.data.decode import File

WAITS = (1.0, 20.0)  # seconds before the second and third attempts
NUM_CONNECTIONS = 16  # concurrent connections per process
TIMEOUT = 60  # seconds per attempt
MAX_IN_A_ROW = 5  # failures of the network after which this process stops trying
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
# Makes an image one request: by default s3fs requests its size first.
_DEFAULTS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 1}, "s3a": {"max_concurrency": 1}}
_SECRET = re.compile(r"secret|token|passw|credential|authorization|account_key|sas", re.IGNORECASE)
_NO_SECRETS = ("anon", "cloud", "google_default")  # values that gcsfs accepts as a token


def open_local(path: bytes) -> File:
    """A local file. Raises OSError, also for a pipe or device, which would block."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("is not a regular file")
    return open(path, "rb")


class Remote:
    """Opens local files and URLs; `options` are fsspec's for file systems (endpoint_url, anon …).

    An option `$NAME` is taken from the environment. Secrets must be given that way, or by the
    provider's own means (AWS_SECRET_ACCESS_KEY, ~/.aws, GOOGLE_APPLICATION_CREDENTIALS …), since
    options are saved with a run.

    Transient failures (no connection, 5xx, timeout, truncation) are retried twice. After several
    such failures in a row every further file fails at once, so that the run ends by
    loader.max_bad_fraction instead of training on replacements.
    """

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.options = options or {}
        _refuse_secrets(self.options)
        self._failed_in_a_row, self._last = 0, ""
        # By process, since connections do not survive a fork. The parent's stay referenced:
        # finalizing them would wait for a thread that the child does not have.
        self._systems: dict[tuple[int, str], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_systems": {}}

    def __call__(self, path: bytes) -> File:
        """The file at a local path or URL. Raises OSError, with a reason, if it cannot be read."""
        if b"://" not in path:
            return open_local(path)
        return io.BytesIO(self.fetch(os.fsdecode(path)))

    def fetch(self, url: str) -> bytes:
        """All bytes of the file at `url`. Raises OSError."""
        (found,) = self.fetch_all([os.fsencode(url)])
        if isinstance(found, OSError):
            raise found
        return found

    def fetch_all(self, paths: Sequence[bytes]) -> list[bytes | OSError]:
        """All bytes of each file, or the error that prevented it; fetched concurrently."""
        urls = [os.fsdecode(path) for path in paths]
        if self._failed_in_a_row >= MAX_IN_A_ROW:
            told = f"not requested, after {MAX_IN_A_ROW} failures in a row, the last: {self._last}"
            return [OSError(told) for _ in urls]
        systems = [self._system(url.partition("://")[0]) for url in urls]
        if len(urls) == 1:
            found = [_fetch(systems[0], urls[0])]
        else:
            with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
                found = list(pool.map(_fetch, systems, urls))
        # Files fetched together count as one failure.
        dead = all(isinstance(answer, _UnreachableError) for answer in found)
        self._failed_in_a_row = self._failed_in_a_row + 1 if dead else 0
        self._last = str(found[-1]) if dead else ""
        return found

    def check(self, protocol: str) -> None:
        """Raise UserError if `protocol` ("s3") is unknown or its package is not installed."""
        from fsspec import get_filesystem_class

        try:
            get_filesystem_class(protocol)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            how = f"pip install 'dino-lite[{extra}]'" if extra else str(error)
            raise UserError(f"{protocol}:// needs a package that is missing: {how}.") from error
        except ValueError as error:
            raise UserError(
                f"{protocol}:// is not a protocol of fsspec: use s3://, gs:// or https://."
            ) from error

    def _system(self, protocol: str) -> Any:
        """This process's file system of a protocol."""
        from fsspec import filesystem

        key = os.getpid(), protocol
        if key not in self._systems:
            self.check(protocol)
            options = _DEFAULTS.get(protocol, {}) | _from_environment(self.options)
            self._systems[key] = filesystem(protocol, **options)
        return self._systems[key]


class _UnreachableError(OSError):
    """A failure that may be transient."""


def _fetch(system: Any, url: str) -> bytes | OSError:
    """All bytes of a file, after several attempts if necessary; or the error."""
    for wait in (*WAITS, None):
        try:
            return _read(system, url)
        except Exception as error:  # each library has its own exceptions
            if _is_final(error):
                return OSError(_reason(error))
            if wait is None:
                return _UnreachableError(f"{_reason(error)} ({len(WAITS) + 1} tries)")
            time.sleep(wait)
    raise AssertionError("the last try returns")


def _read(system: Any, url: str) -> bytes:
    """All bytes of a file, within TIMEOUT seconds if the file system is asynchronous."""
    from fsspec.asyn import sync

    path = system._strip_protocol(url)
    if system.async_impl:
        content = sync(system.loop, system._cat_file, path, timeout=TIMEOUT)
    else:
        content = system.cat_file(path)
    return bytes(content)


def _is_final(error: Exception) -> bool:
    """Whether another attempt would fail as well."""
    status = getattr(
        error, "status", None
    )  # aiohttp's; other libraries raise one of the classes below
    if isinstance(status, int) and status:
        return 400 <= status < 500 and status not in (408, 429)
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return True
    library = type(error).__module__.partition(".")[0]
    if library in ("aiohttp", "aiobotocore", "botocore", "gcsfs", "urllib3"):
        return isinstance(error, ValueError) or "Credentials" in type(error).__name__
    return not isinstance(error, OSError | TimeoutError)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _from_environment(options: Any) -> Any:
    """`options` with $NAME replaced, at any depth."""
    if isinstance(options, dict):
        return {key: _from_environment(value) for key, value in options.items()}
    return os.path.expandvars(options) if isinstance(options, str) else options


def _refuse_secrets(options: dict[str, Any], prefix: str = "data.storage_options") -> None:
    for key, value in options.items():
        if isinstance(value, dict):
            _refuse_secrets(value, f"{prefix}.{key}")
        elif isinstance(value, str) and _SECRET.search(str(key)) and not _is_public(value):
            raise UserError(
                f"{prefix}.{key} would be saved with the run: put the secret into an environment "
                f"variable and give {prefix}.{key}=$NAME, or use the provider's own variables or "
                "files."
            )


def _is_public(value: str) -> bool:
    """Whether the value is the name of a variable, a keyword, or a file with the secret."""
    return value.startswith("$") or value in _NO_SECRETS or os.path.isfile(value)
