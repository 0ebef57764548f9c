"""Interface to Hydra: finds conf/, composes configurations, builds objects from them."""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dino_lite.contracts import UserError
from dino_lite.interrupts import interrupt, on_stop, report_interrupt

Config = dict[str, Any]
# Keys whose values are always taken as strings: `name=1`, `data.root=a,b`, `checkpoint=x=y`.
_VERBATIM = re.compile(
    r".*\.(root|pretrained|labels)|checkpoints?|name|runs_dir|features_dir|out|pack|pictures"
)
_PLAIN = re.compile(r"[\w./+-]*")
# Hydra's flags that affect what is composed; --cfg, so that -c is not parsed as -cd.
_FLAGS = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_FLAGS.add_argument("--config-dir", "-cd")
_FLAGS.add_argument("--config-name", "-cn")
_FLAGS.add_argument("--cfg", "-c")
_FLAGS.add_argument("--multirun", "-m", action="store_true")


def config_dir() -> Path:
    """The folder conf/: next to the package in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise UserError(
        f"dino_lite's configuration is missing in {package / 'conf'}: reinstall the package."
    )


def quote(value: str) -> str:
    """`value` as a quoted string of Hydra's override grammar."""
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda m: m[1] * 2, escaped)
    return "'" + escaped.replace("${", r"\${") + "'"


def quote_override(argument: str) -> str:
    """`argument` with its value quoted if Hydra's grammar would reject or change it."""
    match = re.fullmatch(r"([+~]{0,2}[\w./@:-]+)=(.*)", argument, re.DOTALL)
    if match is None or argument.startswith("-"):
        return argument
    key, value = match[1], match[2]
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if quoted or value in ("", "null"):
        return argument
    if _VERBATIM.fullmatch(key.lstrip("+~")):
        return f"{key}={quote(value)}"
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


def compose(primary: str, overrides: Sequence[str]) -> Config:
    """Compose the configuration `primary` ("pretrain") with `overrides` to plain dicts and lists.

    Includes the keys "overrides" and "choices" of `asked`. Raises UserError for invalid overrides.
    """
    GlobalHydra.instance().clear()
    quoted = [quote_override(override) for override in overrides]
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = hydra.compose(primary, quoted, return_hydra_config=True)
            return asked(to_plain(config), quoted, config.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, primary, quoted)) from None


def asked(config: Config, overrides: Sequence[str], choices: Mapping[str, Any]) -> Config:
    """`config` with the overrides except `trust`, and with the choice in conf/method. Raises
    UserError if a file sets `trust`, and no override does.
    """
    chosen = {group: choices[group] for group in ("method",) if group in choices}
    kept = [each for each in overrides if each.partition("=")[0].lstrip("+") != "trust"]
    if config.get("trust") and len(kept) == len(overrides):
        why = "is set in a configuration file: set it on the command line instead."
        raise UserError(f"trust={config['trust']} {why}")
    return config | {"overrides": kept, "choices": chosen}


def to_plain(config: DictConfig) -> Config:
    """Convert to plain dicts and lists, with interpolations resolved, without Hydra's own node."""
    ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    plain = OmegaConf.to_container(ours, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def instantiate(config: Config, **extra: Any) -> Any:
    """Build the object that `_target_` names, and those nested in it.

    Raises UserError if a constructor does, if a target cannot be imported, or if it does not accept
    the given keys (also checked for partials). Other errors of a constructor are passed on.
    """
    try:
        made = hydra.utils.instantiate(config, _convert_="all", **extra)
    except HydraException as error:
        for cause in _causes(error):
            if isinstance(cause, UserError):
                raise cause from None
        target = config.get("_target_", "a part of the configuration")
        if isinstance(cause, ImportError | AttributeError):
            raise UserError(
                f"{target} cannot be imported ({cause}): your own code must be on PYTHONPATH."
            ) from error
        if isinstance(cause, TypeError) and "argument" in str(cause):
            raise UserError(f"{target} does not accept these keys: {cause}.") from error
        raise
    if isinstance(made, functools.partial):
        try:
            inspect.signature(made.func).bind_partial(*made.args, **made.keywords)
        except TypeError as error:
            raise UserError(f"{config['_target_']} does not accept these keys: {error}.") from error
    return made


def _causes(error: BaseException) -> list[BaseException]:
    """The chain of exceptions from `error` to its root cause."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def save(config: Config, path: Path) -> None:
    """Write `config` as YAML, atomically."""
    partial = path.with_suffix(".tmp")
    OmegaConf.save(OmegaConf.create(config), partial)
    partial.replace(path)


def load(path: Path) -> Config:
    """Read a configuration written by `save`."""
    try:
        return to_plain(OmegaConf.load(path))  # type: ignore[arg-type]
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read as a run's configuration: {error}") from error


def leaves(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) in `config`; a list counts as one value."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def get(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    return functools.reduce(lambda node, part: node[part], key.split("."), config)


def put(config: Config, key: str, value: Any) -> Config:
    """A copy of `config` with `value` at a dotted key."""
    first, _, rest = key.partition(".")
    return config | {first: put(config.get(first) or {}, rest, value) if rest else value}


def differences(old: Config, new: Config) -> list[str]:
    """Dotted keys whose values differ, sorted."""
    a, b = dict(leaves(old)), dict(leaves(new))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def command(primary: str) -> Callable[[Callable[[Config], Any]], Callable[[], None]]:
    """Decorator that makes `function(config)` a command with Hydra's flags and overrides."""

    def wrap(function: Callable[[Config], Any]) -> Callable[[], None]:
        @functools.wraps(function)
        def job(config: DictConfig) -> None:
            with user_errors():
                given = HydraConfig.get()
                function(asked(to_plain(config), given.overrides.task, given.runtime.choices))

        def main() -> None:
            with user_errors(), on_stop(interrupt):
                flags = _FLAGS.parse_known_args()[0]
                overrides = [a for a in sys.argv[1:] if re.match("~|[^-].*=", a, re.DOTALL)]
                searched = any(a.startswith("hydra.searchpath=") for a in overrides)
                if flags.config_dir and not searched:
                    overrides.append(_search_in(flags.config_dir))
                if not (flags.multirun or flags.config_name or (flags.config_dir and searched)):
                    compose(primary, overrides)  # reports errors in one sentence, unlike Hydra
            hydra.main(str(config_dir()), primary, version_base="1.3")(job)()

        return main

    return wrap


@contextmanager
def user_errors() -> Iterator[None]:
    """Report a UserError, a full disk or an unwritable folder in one line and exit with code 2;
    after a signal, such as Ctrl-C, exit with code 128 plus its number.
    """
    try:
        yield
    except UserError as error:
        print(f"dino-lite: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if not full and not isinstance(error, PermissionError | NotADirectoryError):
            raise
        print(f"dino-lite: {error.filename or 'a file'}: {error.strerror}.", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        raise SystemExit(report_interrupt(error)) from error


def _search_in(folder: str) -> str:
    """The override equivalent to --config-dir."""
    if not Path(folder).is_dir():
        raise UserError(f"--config-dir {folder}: there is no such folder.")
    return f"hydra.searchpath=[{quote(f'file://{Path(folder).absolute()}')}]"


def _explain(error: Exception, primary: str, overrides: list[str]) -> str:
    """One sentence for the error in `overrides` that Hydra or OmegaConf reports."""
    text = str(error)
    if isinstance(error, MissingConfigException):
        found = re.search(r"Could not find '([^']+)'", text)
        wanted = found[1] if found else str(error.missing_cfg_file)
        group, _, choice = wanted.rpartition("/")
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            options = loader.get_group_options(group, config_name=primary, overrides=overrides)
        return f"{group}={choice}: there is no such choice; {_nearest(choice, options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be parsed as KEY=VALUE: put the value in quotes."
    if found := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", text):
        return f"{found[1]}: there is no such key; {_nearest(found[1], _keys(primary, overrides))}"
    return " ".join(text.split())


def _keys(primary: str, overrides: list[str]) -> list[str]:
    """The dotted keys of all values and nodes composed by `overrides`, without rejected ones."""
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            keys = [key for key, _ in leaves(to_plain(hydra.compose(primary, overrides)))]
    except (HydraException, OmegaConfBaseException) as error:
        refused = set(re.findall(r"'([^']+)'", str(error)))
        rest = [each for each in overrides if each.partition("=")[0].lstrip("+~") not in refused]
        return _keys(primary, rest if len(rest) < len(overrides) else [])
    nodes = (accumulate(key.split("."), "{}.{}".format) for key in keys)
    return list(dict.fromkeys(chain.from_iterable(nodes)))


def _nearest(word: str, known: list[str]) -> str:
    """The end of a sentence that suggests the entry of `known` closest to `word`, or lists some."""
    last = word.rpartition(".")[2]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5) or [
        key for key in known if key.rpartition(".")[2] == last
    ]
    if not near:
        ends = {key.rpartition(".")[2]: key for key in known}
        near = [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.7)]
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known[:12])}."
