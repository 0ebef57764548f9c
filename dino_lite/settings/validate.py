"""Checks settings against the annotations of the constructor that takes them, without calling it.

`validated` checks a configuration before anything is built; `checked` makes a function check its
own arguments when it is called.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
import pydoc
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from dino_lite.contracts import UserError
from dino_lite.settings.kinds import KeywordsOf, Must, Value, Values

P = ParamSpec("P")
R = TypeVar("R")
_OF_HYDRA = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
_PLAIN: dict[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    type(None): (type(None), "null"),
}


class Parameters(NamedTuple):
    """Annotations and defaults of a function's keywords; `is_open` if it accepts any others.

    `required` are its own keywords without a default, in order; those of functions that it passes
    keywords on to are not among them, since it may set them itself.
    """

    hints: dict[str, Any]
    defaults: dict[str, Any]
    is_open: bool
    required: tuple[str, ...] = ()


class _Refused(Exception):
    """A value that its annotation does not allow; the text completes "it must be ..."."""


@functools.cache
def locate(path: str) -> Any:
    """The class or function at a dotted path (`_target_`). Raises UserError."""
    try:
        found = pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"{path} cannot be imported: {error}.") from error
    if found is None:
        raise UserError(f"{path} cannot be imported: your own code must be on PYTHONPATH.")
    return found


def locate_class(node: Mapping[str, Any], key: str, base: type[R]) -> type[R]:
    """The class that `_target_` of `node` names, derived from `base`. Raises UserError with `key`
    if it names something else.
    """
    found = locate(node["_target_"])
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"{key}._target_={node['_target_']} must name a class derived from "
            f"{base.__module__}.{base.__qualname__}."
        )
    return found


@functools.cache
def parameters(target: Callable[..., Any]) -> Parameters:
    """The keywords of a function, class, NamedTuple or TypedDict."""
    is_record = inspect.isclass(target) and (is_typeddict(target) or issubclass(target, tuple))
    annotated = target if is_record or not inspect.isclass(target) else target.__init__
    try:
        annotations = get_type_hints(annotated, include_extras=True)
    except (AttributeError, NameError, TypeError):  # names that only type checkers import
        annotations = {}
    if is_typeddict(target):
        return Parameters(annotations, {}, True)
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # implemented in C
        return Parameters({}, {}, True)
    known, required = Parameters({}, {}, False), []
    for name, parameter in signature.parameters.items():
        hint = annotations.get(name, Any)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            takers = [taker for mark in _marks(hint, KeywordsOf) for taker in mark.takers]
            more = [parameters(taker) for taker in takers] or [Parameters({}, {}, True)]
            for each in reversed(more):
                hints, defaults = each.hints | known.hints, each.defaults | known.defaults
                known = Parameters(hints, defaults, known.is_open or each.is_open)
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            known.hints[name] = hint
            if parameter.default is inspect.Parameter.empty:
                required.append(name)
            else:
                known.defaults[name] = parameter.default
    return known._replace(required=tuple(required))


def settings_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords for the `_target_` of `node`, including its defaults."""
    return parameters(locate(node["_target_"])).defaults | dict(node)


def validated(
    target: Callable[..., Any],
    settings: Mapping[str, Any],
    prefix: str = "",
    auto: bool = False,
    values: Any = Value,
    num_given: int | None = 0,
) -> dict[str, Any]:
    """`settings` checked as keywords of `target`, recursively for each nested `_target_`. Whole
    numbers written as floats (1e3) are converted to int where an int is required.

    With `auto`, "auto" is allowed for any value. `values` annotates the numbers of a schedule.
    `num_given` is the number of required keywords that the caller of `target` adds (None: unknown).
    Raises UserError with the key (`prefix` prepended) if `target` has no such keyword or requires
    one that is missing, or if its annotation does not allow the value.
    """
    known, read = parameters(target), {}
    for name, value in settings.items():
        key, hint = f"{prefix}{name}", known.hints.get(name, Any)
        if name in _OF_HYDRA or (value is None and known.defaults.get(name, ...) is None):
            read[name] = value
            continue
        if name not in known.hints and not known.is_open:
            near = difflib.get_close_matches(name, known.hints, n=1)
            others = f"choose one of {', '.join(sorted(known.hints))}."
            others = others if known.hints else f"{settings.get('_target_')} takes no keys."
            others = f"did you mean {prefix}{near[0]}?" if near else others
            raise UserError(f"{key}: there is no such key; {others}")
        read[name] = _setting(values if hint == Value else hint, value, key, auto)
    missing = [name for name in known.required if name not in settings]
    if num_given is not None and "_args_" not in settings and missing[num_given:]:
        key = f"{prefix}{missing[num_given]}"
        raise UserError(f"{key}: this key is missing and has no default; give it a value.")
    return read


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate `function` to raise UserError for arguments that its annotations do not allow."""
    signature = inspect.signature(function)
    owner = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hints, bound = parameters(function).hints, signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in hints:
                bound.arguments[name] = _setting(hints[name], value, f"{owner}.{name}", False)
        return function(*bound.args, **bound.kwargs)

    return call


def _marks(hint: Any, kind: type[R]) -> list[R]:
    """All metadata of type `kind` in an annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        return [mark for each in get_args(hint) for mark in _marks(each, kind)]
    return [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, kind)]


def _arity(hint: Any) -> int | None:
    """The number of arguments in an annotation `Callable[[...], ...]`; None if it has none."""
    if get_origin(hint) in (Union, types.UnionType, Annotated):
        return next((n for n in map(_arity, get_args(hint)) if n is not None), None)
    given = get_args(hint)[0] if get_origin(hint) is Callable else None
    return len(given) if isinstance(given, list) else None


def _setting(hint: Any, value: Any, key: str, auto: bool) -> Any:
    """`value`, checked against `hint`. Raises UserError with `key`."""
    if auto and isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, dict) and "_target_" in value:
        numbers = next((mark.kind for mark in _marks(hint, Values)), Value)
        num_given = _arity(hint) if value.get("_partial_") else 0
        return validated(locate(value["_target_"]), value, f"{key}.", auto, numbers, num_given)
    try:
        return _read(hint, value, key, auto)
    except _Refused as refused:
        raise UserError(f"{key}={shown(value)}: it must be {refused}.") from None


def _read(hint: Any, value: Any, key: str, auto: bool) -> Any:
    """Like `_setting`, for values without `_target_`; raises _Refused."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        musts = _marks(hint, Must)
        try:
            value = _read(args[0], value, key, auto)
        except _Refused as refused:
            raise _Refused(musts[0].be if musts else str(refused)) from None
        for must in musts:
            if not must.holds(value):
                raise _Refused(must.be)
        return value
    if origin in (Union, types.UnionType):
        refusals = []
        for each in sorted(args, key=lambda each: each is type(None)):
            try:
                return _read(each, value, key, auto)
            except _Refused as refused:
                refusals.append(str(refused))
        raise _Refused(", or ".join(refusals))
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        raise _Refused(("one of " if len(args) > 1 else "") + ", ".join(map(shown, args)))
    if isinstance(hint, type) and hint in _PLAIN:
        return _read_plain(hint, value)
    return _read_compound(origin or hint, args, value, key, auto)


def _read_plain(kind: type, value: Any) -> Any:
    """A bool, number, string or null; a whole float is converted where an int is required."""
    allowed, name = _PLAIN[kind]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    odd = isinstance(value, bool) and kind is not bool
    odd |= isinstance(value, float) and not math.isfinite(value)
    if odd or not isinstance(value, allowed):
        raise _Refused(name)
    return value


def _read_compound(kind: Any, args: tuple[Any, ...], value: Any, key: str, auto: bool) -> Any:
    """A list, a mapping or an object, with its contents."""
    is_class = isinstance(kind, type)
    is_record = is_typeddict(kind) or (is_class and hasattr(kind, "_fields"))
    if is_record and isinstance(value, dict):
        return validated(kind, value, f"{key}.", auto)
    if is_record and isinstance(value, kind):  # built already
        return kind(**validated(kind, value._asdict(), f"{key}."))
    if is_record and isinstance(value, str | Real | list | None):
        raise _Refused("a group of keys")
    if is_class and issubclass(kind, os.PathLike):
        if not isinstance(value, str | os.PathLike):
            raise _Refused("a path")
        return value
    is_list = is_class and issubclass(kind, Sequence)
    is_group = is_class and issubclass(kind, Mapping)
    if isinstance(value, list | tuple) and (is_list or kind is Any):
        fixed = kind is tuple and ... not in args
        if fixed and args and len(args) != len(value):
            raise _Refused(f"a list of {len(args)} values")
        hints = args if fixed and args else [args[0] if args else Any] * len(value)
        try:
            pairs = zip(hints, value, strict=True)
            read = [(_setting if isinstance(v, dict) else _read)(h, v, key, auto) for h, v in pairs]
        except _Refused as refused:
            raise _Refused(f"a list, each {refused}") from None
        return tuple(read) if isinstance(value, tuple) else read
    if isinstance(value, dict) and (is_group or kind is Any):
        hint = args[1] if len(args) == 2 else Any
        return {name: _setting(hint, each, f"{key}.{name}", auto) for name, each in value.items()}
    if is_list and isinstance(value, str | Real | dict | None):
        raise _Refused("a list")
    if is_group and isinstance(value, str | Real | list | None):
        raise _Refused("a group of keys")
    ours = str(getattr(kind, "__module__", "")).startswith("dino_lite.")
    if (ours or kind is Callable) and isinstance(value, dict):
        raise UserError(f"{key}._target_: this key is missing; it must name a class or function.")
    if (ours or kind is Callable) and isinstance(value, str | Real | list | None):
        raise _Refused("a group of keys with a _target_")
    return value


def shown(value: Any) -> str:
    """`value` in YAML notation."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
