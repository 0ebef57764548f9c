"""Hydra's door: find conf/, compose and check a configuration, build objects from it."""

from __future__ import annotations

import difflib
import errno
import functools
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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

Config = dict[str, Any]
# Always strings, whatever they look like: `name=1`, `data.root=a,b`, `checkpoint=x=y`.
_VERBATIM = re.compile(
    r"(.*\.root|checkpoints?|name|runs_dir|features_dir|.*\.pretrained|.*\.labels|out|pack"
    r"|pictures)"
)
_PLAIN = re.compile(r"[\w./+-]*")


def config_dir() -> Path:
    """The folder conf/: beside the package in a checkout or an editable install, inside it in a
    wheel.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise UserError(
        f"dino_lite's configuration is not at {package / 'conf'}: install the package again."
    )


def quote(value: str) -> str:
    """`value` as a quoted string of Hydra's override grammar."""
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda m: m[1] * 2, escaped)
    return "'" + escaped.replace("${", r"\${") + "'"


def quote_override(argument: str) -> str:
    """`argument` with its value quoted where that is needed; what is quoted already stays."""
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
    """`override` without the quotes that `quote_override` would put back."""
    key, _, value = override.partition("=")
    if not value.startswith("'"):
        return override
    plain = f"{key}={OverridesParser.create().parse_overrides([override])[0].value()}"
    return plain if quote_override(plain) == override else override


def parses(override: str) -> bool:
    """True where Hydra's grammar takes `override`."""
    try:
        OverridesParser.create().parse_overrides([override])
    except HydraException:
        return False
    return True


def compose(primary: str, overrides: Sequence[str]) -> Config:
    """The configuration `primary` (as "pretrain") with `overrides`, as plain dicts and lists, and
    under "overrides" and "choices" how it was asked for; mistakes are UserErrors.
    """
    GlobalHydra.instance().clear()
    quoted = [quote_override(override) for override in overrides]
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = hydra.compose(primary, quoted, return_hydra_config=True)
            return to_plain(config) | asked(quoted, config.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, primary)) from None


def asked(overrides: Sequence[str], choices: Mapping[str, Any]) -> Config:
    """How a configuration was asked for: overrides but `trust`, and which of conf/method it is."""
    chosen = {group: choices[group] for group in ("method",) if group in choices}
    kept = [each for each in overrides if each.partition("=")[0].lstrip("+") != "trust"]
    return {"overrides": kept, "choices": chosen}


def to_plain(config: DictConfig) -> Config:
    """Plain dicts and lists, interpolations resolved, without Hydra's own node."""
    ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    plain = OmegaConf.to_container(ours, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def instantiate(config: Config, **extra: Any) -> Any:
    """Build what `_target_` names, whole tree. UserErrors pass; a target that is not there, or keys
    it has not, are one.

    What goes wrong inside a constructor is its own error, with its own traceback. Keys of a partial
    are looked at now, not where it is called.
    """
    try:
        made = hydra.utils.instantiate(config, _convert_="all", **extra)
    except HydraException as error:
        causes = _causes(error)
        for cause in causes:
            if isinstance(cause, UserError):
                raise cause from None
        cause = causes[-1]
        target = config.get("_target_", "a part of the configuration")
        if isinstance(cause, ImportError | AttributeError):
            raise UserError(
                f"{target} cannot be imported ({cause}): code of your own must be on PYTHONPATH."
            ) from error
        if isinstance(cause, TypeError) and "argument" in str(cause):
            raise UserError(f"{target} does not take these keys: {cause}.") from error
        raise
    if isinstance(made, functools.partial):
        try:
            inspect.signature(made.func).bind_partial(*made.args, **made.keywords)
        except TypeError as error:
            said = f"{config['_target_']} does not take these keys: {error}."
            raise UserError(said) from error
    return made


def locate(target: str) -> Any:
    """Import what `_target_` names."""
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{target} cannot be imported ({error}): code of your own must be on PYTHONPATH."
        ) from error


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in `node`, however deep."""
    if isinstance(node, dict):
        yield from [str(node["_target_"])] if "_target_" in node else []
        node = list(node.values())
    for part in node if isinstance(node, list) else ():
        yield from targets(part)


def _causes(error: BaseException) -> list[BaseException]:
    """The error and all that led to it, the first cause last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def save(config: Config, path: Path) -> None:
    """Write `config` as YAML, whole or not at all."""
    partial = path.with_suffix(".tmp")
    OmegaConf.save(OmegaConf.create(config), partial)
    partial.replace(path)


def load(path: Path) -> Config:
    """Read what `save` wrote."""
    try:
        return to_plain(OmegaConf.load(path))  # type: ignore[arg-type]
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read as a run's configuration: {error}") from error


def leaves(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) below `config`; a list is one value."""
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
    """Make `function(config)` a command line: Hydra's flags and overrides, one sentence and exit
    code 2 for UserErrors.
    """

    def wrap(function: Callable[[Config], Any]) -> Callable[[], None]:
        @functools.wraps(function)
        def job(config: DictConfig) -> None:
            with user_errors():
                given = HydraConfig.get()
                function(to_plain(config) | asked(given.overrides.task, given.runtime.choices))

        def main() -> None:
            with user_errors():
                overrides = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]
                multirun = {"-m", "--multirun"} & set(sys.argv)
                searched = {"--config-dir", "-cd", "--config-name", "-cn"} & set(sys.argv)
                if not multirun and not searched:
                    compose(primary, overrides)  # Hydra's own words for a mistake are a page long
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=primary)(
                job
            )()

        return main

    return wrap


class user_errors:
    """Context that turns a UserError into its sentence on stderr and exit code 2.

    So are a full disk, a folder that cannot be written, and Ctrl-C (exit code 130).
    """

    _OF_THE_MACHINE = frozenset(
        {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EDQUOT}
    )

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            print(f"dino-lite: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        if isinstance(error, OSError) and error.errno in self._OF_THE_MACHINE:
            print(f"dino-lite: {error.filename or 'a file'}: {error.strerror}.", file=sys.stderr)
            raise SystemExit(2) from error
        if isinstance(error, KeyboardInterrupt):
            print("dino-lite: interrupted.", file=sys.stderr)
            raise SystemExit(130) from error


def _explain(error: Exception, primary: str) -> str:
    """One sentence for what Hydra or OmegaConf found wrong with an override."""
    text = str(error)
    if isinstance(error, MissingConfigException):
        found = re.search(r"Could not find '([^']+)'", text)
        wanted = found[1] if found else str(error.missing_cfg_file)
        group, _, choice = wanted.rpartition("/")
        options = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
        return f"{group}={choice}: there is no such choice; {_nearest(choice, options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read as KEY=VALUE: put the value in quotes."
    found = re.search(r"Could not override '([^']+)'", text)
    if found:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            known = [key for key, _ in leaves(to_plain(hydra.compose(primary)))]
        parents = {key.rpartition(".")[0] for key in known} - {""}
        return f"{found[1]}: there is no such key; {_nearest(found[1], [*known, *sorted(parents)])}"
    return " ".join(text.split())


def _nearest(word: str, known: list[str]) -> str:
    known = [key for key in known if key != word]  # which the choice that was made has not
    last = word.rpartition(".")[2]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5) or [
        key for key in known if key.rpartition(".")[2] == last
    ]
    if not near:
        ends = {key.rpartition(".")[2]: key for key in known}
        near = [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.7)]
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known[:12])}."
