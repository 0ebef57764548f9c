"""dino_lite: self-supervised pretraining of vision backbones on a folder of images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dino_lite.version import __version__ as __version__

if TYPE_CHECKING:
    from dino_lite.commands.adapt import adapt as adapt
    from dino_lite.commands.distill import distill as distill
    from dino_lite.commands.embed import embed as embed
    from dino_lite.commands.evaluate import evaluate as evaluate
    from dino_lite.commands.export import export as export
    from dino_lite.commands.pretrain import pretrain as pretrain
    from dino_lite.formats.safetensors import load_backbone as load_backbone

_WHERE = {
    "pretrain": "dino_lite.commands.pretrain",
    "adapt": "dino_lite.commands.adapt",
    "distill": "dino_lite.commands.distill",
    "evaluate": "dino_lite.commands.evaluate",
    "export": "dino_lite.commands.export",
    "embed": "dino_lite.commands.embed",
    "load_backbone": "dino_lite.formats.safetensors",
}


def __getattr__(name: str) -> Any:
    """The Python interface, imported on first use (PEP 562): `import dino_lite` does not import
    torch.
    """
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
