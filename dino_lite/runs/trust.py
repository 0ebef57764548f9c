"""Saved configurations may name classes of any package: which of them may be imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dino_lite.backbones.spec import Trust, is_trusted, untrusted
from dino_lite.settings.validate import locate


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in `node`, however deep."""
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and "_target_" in node:
        yield str(node["_target_"])
    for part in parts:
        yield from targets(part)


def demand_trust(node: Any, trust: Trust, where: object) -> Any:
    """`node` of the saved configuration `where`, if every class that it names is of dino_lite or of
    a package that `trust` names; else UserError, and nothing of that code is imported.
    """
    for target in targets(node):
        ours = target.startswith("dino_lite.") and locate(target).__module__
        if not is_trusted(target, trust) and not str(ours).startswith("dino_lite."):
            raise untrusted(str(where), target)
    return node
