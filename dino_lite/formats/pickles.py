"""Reads off a pickle's opcodes, before it is loaded, what that would call and how long it takes."""

from __future__ import annotations

import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import Any, NamedTuple

from dino_lite.contracts import UserError

# Called with a number, they take memory for as many values.
_ALLOCATES = re.compile(r"torch\.(.*\.)?(\w*Tensor|\w*Storage)$|builtins\.bytearray$")
_CALLS = "torch._tensor._rebuild_from_type_v2"  # calls its first argument with its third
_ENCODES = "_codecs.encode"  # how bytes are pickled
_ENCODINGS = ("", "latin1", "latin-1", "utf-8", "ascii")  # in linear time
# Values in tuples that a pickle stores once and takes again, which it hashes as often; and depth of
# tuples inside tuples, of which Python's hash would overflow the stack.
_MOST_SHARED, _DEEPEST = 2**24, 64


class _Item(NamedTuple):
    """What is known of an object on an unpickler's stack."""

    name: str = ""  # of a class or function, or a short text
    size: int = 0  # values in a tuple, counted as often as they occur
    parts: tuple[str, ...] | None = None  # names of a tuple's first items
    depth: int = 0  # of tuples inside tuples


_MARK, _BYTES = _Item("a mark"), _Item("some bytes")


def named_in(stream: Any, asked: str) -> set[str]:
    """Python 3's names of the classes and functions in one pickle of the binary file `stream`,
    which stops behind it. `asked` is the prefix of messages. Raises UserError if unpickling would
    take memory or time beyond the size of the file, and ValueError if it is no pickle.
    """
    found: set[str] = set()
    stack: list[_Item] = []
    memo: dict[Any, _Item] = {}
    shared = 0
    for code, argument, _ in pickletools.genops(stream):
        name, taken = code.name, _taken(code, stack)
        made = _Item()
        if name == "PROTO" and argument != 2:
            raise UserError(
                f"{asked} is written in pickle protocol {argument}, which is not read without "
                "running code: save it again by torch.save with its default pickle_protocol."
            )
        if name == "GLOBAL":
            made = _Item(_in_python_3(str(argument)))
            found.add(made.name)
        elif "TUPLE" in name:
            inside = [item for item in taken if item is not _MARK]
            size = len(inside) + sum(item.size for item in inside)
            depth = 1 + max((item.depth for item in inside), default=0)
            made = _Item("", size, tuple(item.name for item in inside[:3]), depth)
        elif name == "BINUNICODE" and len(text := str(argument)) < 16:
            made = _Item(text)
        elif name == "MARK":
            made = _MARK
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            made = memo[argument]
            shared += made.size
        elif name in ("REDUCE", "NEWOBJ"):
            _check_call(taken[0].name, taken[1].parts, asked)
            made = _BYTES if taken[0].name == _ENCODES else made
        elif len(taken) > 1:  # into which items are put
            made = taken[0]
        if shared > _MOST_SHARED or made.depth > _DEEPEST:
            raise UserError(
                f"{asked} has tuples inside tuples, deeper than {_DEEPEST} or repeated more than "
                f"{_MOST_SHARED:,} times, which no weights need: get it from a source that you "
                "trust."
            )
        if code.stack_after:
            stack.append(made)
    return found


def _taken(code: Any, stack: list[_Item]) -> list[_Item]:
    """Take from the stack what the opcode `code` does, the first first."""
    at = len(stack) - len(code.stack_before)
    if pickletools.markobject in code.stack_before:
        marks = (place for place in reversed(range(len(stack))) if stack[place] is _MARK)
        at = next(marks, -1) - code.stack_before.index(pickletools.markobject)
    if at < 0:
        raise ValueError("an opcode takes more than there is")
    taken = stack[at:]
    del stack[at:]
    return taken


def _check_call(called: str, parts: tuple[str, ...] | None, asked: str) -> None:
    """Raise UserError for a call that takes memory or time beyond the size of the file; `parts`
    are the names of its first arguments, if known.
    """
    given = parts or ()
    if called == _CALLS and given:
        called = "" if given[0].startswith("torch._utils._rebuild_") else given[0] or "a function"
    elif called == _ENCODES:
        called = "" if parts is not None and (*given, "", "")[1] in _ENCODINGS else called
    elif _ALLOCATES.match(called):
        called = "" if parts == () or given == (_BYTES.name,) else called
    else:
        called = ""
    if called:
        raise UserError(
            f"{asked} would call {called} when unpickled, which can take any amount of memory or "
            "time: save a plain state_dict() by torch.save."
        )


def _in_python_3(argument: str) -> str:
    """The dotted name of "module name" as pickled, maybe in Python 2."""
    module, _, name = argument.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
