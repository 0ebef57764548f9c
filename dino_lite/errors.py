"""Errors that are a user's: reported in one sentence, without a traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dino_lite.interrupts import report_interrupt

# Of terminals, of new lines and of writing from right to left.
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")
# Of an OSError: what a user can mend.
_OF_THE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class UserError(Exception):
    """A user's mistake, in one sentence: what is wrong, where, what to do. Exit code 2.

    Control characters, which names in a file may have, are written as in Python's text.
    """

    exit_code = 2

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in arguments))


def printable(text: str) -> str:
    """`text` in one line, with an escape for each control character."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Interrupted(UserError):
    """A signal has ended the command; the sentence says what is left of its work."""

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.number, self.exit_code = number, 128 + number


def sentence(error: Exception) -> str | None:
    """What to tell the user about a UserError, a full disk, an unwritable folder or a name that is
    too long. None for other errors.
    """
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.ENAMETOOLONG:
        longest = max(str(error.filename).split(os.sep), key=len)
        return f"{longest}: {len(os.fsencode(longest))} bytes are too long for the name of a file."
    if error.errno in _OF_THE_SYSTEM or isinstance(error, PermissionError | NotADirectoryError):
        return f"{error.filename or 'a file'}: {error.strerror}."
    return None


@contextmanager
def user_errors() -> Iterator[None]:
    """Report in one line what `sentence` knows, and exit with code 2; after a signal, such as
    Ctrl-C, exit with code 128 plus its number.
    """
    try:
        yield
    except Exception as error:
        if (said := sentence(error)) is None:
            raise
        print(f"dino-lite: {said}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 2)) from error
    except KeyboardInterrupt as error:
        raise SystemExit(report_interrupt(error)) from error
