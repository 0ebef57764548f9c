"""Decides which classes named by a saved configuration may be imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch.optim import Optimizer

from dino_lite.backbones.spec import is_trusted, untrusted
from dino_lite.contracts import Trust
from dino_lite.planning.checks import target_nodes
from dino_lite.settings.validate import locate

# The packages of dino_lite whose classes configurations name.
_PARTS = r"dino_lite\.(backbones|callbacks|data|eval|losses|methods|nn|optim)"
_OPENER = r"dino_lite\.data\.\w+\.open_\w+"


def targets(value: Any) -> Iterator[str]:
    """Every `_target_` in `value`, at any depth."""
    return (str(node["_target_"]) for node in target_nodes(value))


def demand_trust(names: Iterable[str], trust: Trust, where: object) -> None:
    """Raise UserError for targets of the saved configuration `where` that are neither parts of
    dino_lite nor of a package that `trust` names. Their code is not imported.
    """
    for target in names:
        if not is_trusted(target, trust) and not _is_harmless(target):
            raise untrusted(str(where), target)


def _is_harmless(target: str) -> bool:
    """Whether `target` is a class or a data opener of dino_lite that configurations name, or an
    optimizer of torch. Other functions of dino_lite may import what their arguments name.
    """
    if not re.fullmatch(rf"torch\.optim\.\w+|{_PARTS}\.\w+\.\w+", target):
        return False
    found = locate(target)
    home = str(getattr(found, "__module__", ""))
    if isinstance(found, type):
        return issubclass(found, Optimizer) or re.match(rf"{_PARTS}\.", home) is not None
    return re.fullmatch(_OPENER, target) is not None and target.startswith(f"{home}.")
