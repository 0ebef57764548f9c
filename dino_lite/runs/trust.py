"""Decides which classes named by a saved configuration may be imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dino_lite.backbones.spec import is_trusted, untrusted
from dino_lite.contracts import Trust
from dino_lite.settings.validate import locate


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in `node`, at any depth."""
    if isinstance(node, dict):
        yield from [str(node["_target_"])] if "_target_" in node else []
        node = list(node.values())
    for part in node if isinstance(node, list) else ():
        yield from targets(part)


def demand_trust(names: Iterable[str], trust: Trust, where: object) -> None:
    """Raise UserError for targets of the saved configuration `where` that belong neither to
    dino_lite nor to a package that `trust` names. Their code is not imported.
    """
    for target in names:
        ours = target.startswith("dino_lite.") and getattr(locate(target), "__module__", None)
        if not is_trusted(target, trust) and not str(ours).startswith("dino_lite."):
            raise untrusted(str(where), target)
