"""Choices that conf/ has no file for: `backbone=NAME` with the name of a timm model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException

from dino_lite.settings.words import MAIN, looks_like_path


def wanted_choice(error: Exception) -> str:
    """GROUP/CHOICE that Hydra has not found; "" if `error` is about something else."""
    if not isinstance(error, MissingConfigException):
        return ""
    found = re.search(r"Could not find '([^']+)'", str(error))
    return found[1] if found else str(error.missing_cfg_file)


@contextmanager
def own_choices() -> Iterator[None]:
    """Forget what `add_choice` made known, until the end: a later caller may have such a file."""
    store = ConfigStore.instance()
    before = store.repo
    store.repo = {name: group for name, group in before.items() if name != "backbone"}
    try:
        yield
    finally:
        store.repo = before


def add_choice(wanted: str) -> bool:
    """If `wanted`, GROUP/CHOICE that no file has, is `backbone/NAME` with a supported timm model,
    make it known to Hydra, where files come first; returns whether it is.
    """
    group, _, name = wanted.partition("/")
    if group != "backbone" or not name or "/" in name:
        return False
    from dino_lite.backbones.named import choice_for  # imports torch and timm

    choice = choice_for(name)
    if choice is not None:
        node = {"defaults": [choice, "_self_"], "name": name}
        ConfigStore.instance().store(name, node, group, provider="timm")
    return choice is not None


def explain_choice(command: str, wanted: str, options: list[str]) -> str | None:
    """One sentence for GROUP/CHOICE that does not exist where more is known than the `options`: for
    paths, and names of networks. Otherwise None.
    """
    group, _, choice = wanted.partition("/")
    if group == "data" and looks_like_path(choice):
        alone = f", or the path alone: dino-lite {command} {choice}"
        alone = alone if MAIN.get(command) == "data.root" else ""
        return f"data={choice}: data= names a kind of source; write data.root={choice}{alone}."
    if group == "backbone" and "/" in choice:
        start = f"backbone.pretrained={choice}"
        return f"backbone={choice}: to start from the weights in a file, write {start}."
    if group == "backbone":
        from dino_lite.backbones.named import explain_name

        return explain_name(choice, options)
    return None
