"""The command line as Hydra reads it: flags, and overrides whose values its grammar can parse."""

from __future__ import annotations

import functools
import os
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dino_lite.errors import UserError

# Keys whose values are always strings: `name=1`, `data.root=a,b` without a sweep, `out=x=y`.
_VERBATIM = re.compile(
    r".*\.(root|pretrained|labels)|checkpoints?|name|runs_dir|features_dir|out|pack|pictures"
)
_COMPLETION = re.compile("(install|uninstall|query)=(bash|fish|zsh)")
_PLAIN = re.compile(r"[\w./+-]*")


def read_flags(arguments: Sequence[str]) -> Namespace:
    """Hydra's flags in `arguments`, with what else there is as `overrides`; both in any order.
    Raises UserError for what Hydra refuses.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(arguments)
    modes = (flags.run, flags.multirun, flags.cfg, flags.info, flags.shell_completion)
    if sum(map(bool, modes)) > 1:
        raise UserError(
            "--run, --multirun, --cfg, --info and --shell-completion exclude each other: choose "
            "one of them."
        )
    if flags.shell_completion and not _COMPLETION.fullmatch(" ".join(flags.overrides)):
        raise UserError(
            "--shell-completion takes install=SHELL, uninstall=SHELL or query=SHELL, with bash, "
            'fish or zsh, as in: eval "$(dino-lite -sc install=bash)".'
        )
    return flags


def unknown_flags(arguments: Sequence[str]) -> list[str]:
    """The flags in `arguments` that Hydra does not have, `--data` or `--epochs=3`."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    return list(parser.parse_known_intermixed_args(arguments)[1])


def _refuse(message: str) -> NoReturn:
    raise UserError(
        f"{message}; settings are KEY=VALUE without dashes, and --help lists the flags."
    )


def shows_only(flags: Namespace) -> bool:
    """Whether Hydra prints something instead of running the command."""
    return bool(flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion)


def quoted(
    arguments: Sequence[str], translate: Callable[[list[str]], list[str]] = list
) -> list[str]:
    """`arguments` as Hydra can read them: overrides first, translated and quoted where needed, then
    the flags. Raises UserError as `read_flags` does.
    """
    flags = read_flags(arguments)
    if flags.shell_completion:  # these are not overrides
        return list(arguments)
    rest = list(arguments)
    for override in flags.overrides:
        rest.reverse()  # the last of equal words: the first may be the value of a flag
        rest.remove(override)
        rest.reverse()
    quoting = functools.partial(quote_override, several=flags.multirun)
    return [*map(quoting, translate(flags.overrides)), *rest]


def quote(value: str) -> str:
    """`value` as a quoted string of Hydra's override grammar."""
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda m: m[1] * 2, escaped)
    return "'" + escaped.replace("${", r"\${") + "'"


def quote_override(argument: str, several: bool = False) -> str:
    """`argument` with its value quoted if Hydra's grammar would reject or change it. In a sweep,
    of `several`, commas separate paths and names, unless there is such a path.
    """
    match = re.fullmatch(r"([+~]{0,2}[\w./@:-]+)=(.*)", argument, re.DOTALL)
    if match is None or argument.startswith("-"):
        return argument
    key, value = match[1], match[2]
    has_quotes = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if has_quotes or value in ("", "null"):
        return argument
    if _VERBATIM.fullmatch(key.lstrip("+~")):
        is_one = not several or value.startswith("[") or os.path.exists(os.path.expanduser(value))
        return f"{key}={','.join(map(quote, [value] if is_one else value.split(',')))}"
    if _PLAIN.fullmatch(value):
        return argument
    return argument if parses(argument) else f"{key}={quote(value)}"


def unquote(override: str) -> str:
    """Undo `quote_override`."""
    key, _, value = override.partition("=")
    if not value.startswith("'"):
        return override
    plain = f"{key}={OverridesParser.create().parse_overrides([override])[0].value()}"
    return plain if quote_override(plain) == override else override


def parses(override: str) -> bool:
    """Whether `override` follows Hydra's grammar."""
    try:
        OverridesParser.create().parse_overrides([override])
    except HydraException:
        return False
    return True
