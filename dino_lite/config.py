"""Interface to Hydra: finds conf/, composes configurations, builds objects from them."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate, chain
from pathlib import Path
from textwrap import fill
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dino_lite.choices import add_choice, explain_choice, own_choices, wanted_choice
from dino_lite.errors import UserError, user_errors
from dino_lite.interrupts import interrupt, on_stop
from dino_lite.overrides import quote, quote_override, quoted, read_flags, unknown_flags
from dino_lite.settings.words import as_overrides, explain_flag
from dino_lite.sweep import Sweep, jobs_of

Config = dict[str, Any]


def config_dir() -> Path:
    """The folder conf/: next to the package in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise UserError(
        f"dino_lite's configuration is missing in {package / 'conf'}: reinstall the package."
    )


def arguments_of(primary: str, given: Sequence[str]) -> list[str]:
    """The command line of `primary` as Hydra can read it: overrides, with paths that stand alone as
    KEY=VALUE, then flags. Raises UserError.
    """
    for flag in unknown_flags(given):
        raise UserError(explain_flag(primary, flag, given, config_dir()))
    return quoted(given, functools.partial(as_overrides, primary, conf=config_dir()))


def compose(primary: str, overrides: Sequence[str]) -> Config:
    """Compose the configuration `primary` ("pretrain") with `overrides` to plain dicts and lists.

    Includes the keys "overrides" and "choices" of `asked`. Raises UserError for invalid overrides.
    """
    with own_choices():
        return _compose(primary, overrides)


def _compose(primary: str, overrides: Sequence[str]) -> Config:
    """`compose`; what it finds among timm's models stays known to Hydra."""
    words = [*map(quote_override, as_overrides(primary, overrides, config_dir()))]
    try:
        with _hydra():
            config = hydra.compose(primary, words, return_hydra_config=True)
            return asked(to_plain(config), words, config.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if add_choice(wanted_choice(error)):
            return _compose(primary, overrides)
        raise UserError(_explain(error, primary, words)) from None


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra on conf/. Afterwards its state is that of the calling program, which may use it too."""
    kinds = (GlobalHydra, JobRuntime, VersionBase)
    theirs = {kind: Singleton._instances.pop(kind, None) for kind in kinds}
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            yield
    finally:
        for kind, instance in theirs.items():
            Singleton._instances.pop(kind, None)
            if instance is not None:
                Singleton._instances[kind] = instance


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
        sweep = Sweep()

        @functools.wraps(function)
        def job(config: DictConfig) -> None:
            given = HydraConfig.get()
            several, words = given.mode == RunMode.MULTIRUN, given.overrides.task
            with user_errors(), on_stop(interrupt), sweep.job(words) if several else nullcontext():
                function(asked(to_plain(config), words, given.runtime.choices))

        def main() -> None:
            with user_errors(), on_stop(interrupt):
                sys.argv[1:] = arguments_of(primary, sys.argv[1:])
                flags = read_flags(sys.argv[1:])
                jobs = check_overrides(primary, flags)
            if flags.help and jobs:
                print(_help(primary, jobs[0]))
                return
            with sweep.report():
                hydra.main(str(config_dir()), primary, version_base="1.3")(job)()

        return main

    return wrap


def check_overrides(primary: str, flags: Namespace) -> list[list[str]]:
    """Compose what the command line asks for, to report errors in one sentence, unlike Hydra: the
    overrides of each job, none if other flags decide what is composed. Raises UserError.
    """
    overrides = list(flags.overrides)
    searched = any(each.startswith("hydra.searchpath=") for each in overrides)
    if flags.config_name or flags.config_path or flags.shell_completion or flags.experimental_rerun:
        return []
    if flags.config_dir:
        if not Path(flags.config_dir).is_dir():
            raise UserError(f"--config-dir {flags.config_dir}: there is no such folder.")
        if searched:
            return []
        folder = quote(f"file://{Path(flags.config_dir).absolute()}")
        overrides.append(f"hydra.searchpath=[{folder}]")
    jobs = [overrides]
    if flags.multirun:
        with _hydra():
            jobs = jobs_of(overrides, GlobalHydra.instance().config_loader())
    for job in jobs:
        _compose(primary, job)
    return jobs


def _help(primary: str, overrides: list[str]) -> str:
    """What --help prints: the command's own text, its groups with their choices, and flags."""
    with _hydra():
        config = hydra.compose(primary, overrides, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        own = {*config, *config.hydra.runtime.choices} - {"hydra"}
        groups = [group for group in loader.list_groups("") if group in own]
        choices = {group: ", ".join(loader.get_group_options(group)) for group in groups}
    lines = [fill(f"  {g:11}{c}", 100, subsequent_indent=" " * 13) for g, c in choices.items()]
    title = "Choices, GROUP=CHOICE; a setting of the chosen one is GROUP.KEY=VALUE:\n\n"
    parts = [config.hydra.help.header, title + "\n".join(lines) if lines else ""]
    return "\n\n".join(part for part in [*parts, config.hydra.help.footer] if part)


def _explain(error: Exception, primary: str, overrides: list[str]) -> str:
    """One sentence for the error in `overrides` that Hydra or OmegaConf reports."""
    text = str(error)
    if wanted := wanted_choice(error):
        group, _, choice = wanted.rpartition("/")
        with _hydra():
            loader = GlobalHydra.instance().config_loader()
            options = loader.get_group_options(group, config_name=primary, overrides=overrides)
        if (why := explain_choice(primary, wanted, options)) is not None:
            return why
        return f"{group}={choice}: there is no such choice; {_nearest(choice, options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be parsed as KEY=VALUE: put the value in quotes."
    if found := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", text):
        return f"{found[1]}: there is no such key; {_nearest(found[1], _keys(primary, overrides))}"
    return " ".join(text.split())


def _keys(primary: str, overrides: list[str]) -> list[str]:
    """The dotted keys of all values and nodes composed by `overrides`, without rejected ones."""
    try:
        with _hydra():
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
