"""The command line as Hydra reads it: flags, and overrides whose values its grammar can parse."""

from __future__ import annotations

import functools
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.errors import HydraException

from dino_lite.errors import UserError

# Keys whose values are always strings: `name=1`, `data.root=a,b` without a sweep, `out=x=y`.
_VERBATIM = re.compile(
    r".*\.(root|pretrained|labels)|checkpoints?|stages|name|runs_dir|features_dir|out|pack|pictures"
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


def job_arguments() -> list[str]:
    """The arguments that run the job of Hydra that is running now, without others of a sweep."""
    given, flags = HydraConfig.get(), read_flags(sys.argv[1:])
    search = [each for each in given.overrides.hydra if each.startswith("hydra.searchpath=")]
    folder = Path(given.runtime.cwd, flags.config_dir) if flags.config_dir else None
    kept = {"path": flags.config_path, "name": flags.config_name, "dir": folder}
    where = [f"--config-{key}={value}" for key, value in kept.items() if value]
    return [*given.overrides.task, *search, *where]


@contextmanager
def outside_hydra() -> Iterator[None]:
    """Context in which no job of Hydra seems to run: Lightning starts the other processes of one by
    a command line of its own, which does not fit jobs of a sweep.
    """
    job = Singleton._instances.pop(HydraConfig, None)
    try:
        yield
    finally:
        Singleton._instances.pop(HydraConfig, None)
        if job is not None:
            Singleton._instances[HydraConfig] = job
