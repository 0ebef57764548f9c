"""Projection heads in a file of weights: those of DINO, iBOT, DINOv2, DINOv3 and our runs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from dino_lite.contracts import UserError
from dino_lite.formats.layouts import WRAPPERS, teachers
from dino_lite.formats.owner import Tensors
from dino_lite.formats.sound import misfit
from dino_lite.nn.heads import DINOHead

_NAME = re.compile(
    r"(?:^|(?<=\.))(head|dino_head|patch_head|ibot_head)\.((?:mlp|last_layer)2?\..*)"
)
_OF_PATCHES = ("patch_head", "ibot_head")
_WEIGHT_NORM = {  # torch's names of weight normalization, since 2.0
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}


def load_heads(method: nn.Module, tensors: Tensors) -> list[str]:
    """Load the projection heads in `tensors` (the teacher's if there are several) into those of
    `method`, student's and teacher's alike, where all names and shapes agree. Returns one clause
    for each kind of head.
    """
    found, said = find_heads(tensors), {}
    for name, module in method.named_modules():
        kind = name.rpartition(".")[2]
        if not isinstance(module, DINOHead) or kind not in ("head", "patch_head"):
            continue
        weights = found.get(kind)
        if weights is None:
            why = "the file has none"
        elif why := misfit(module.state_dict(), weights):
            why += " here"
        else:
            module.load_state_dict(weights)
        said[kind] = f"{kind} starts fresh: {why}" if why else f"{kind} is the file's"
    return [*said.values()]


def head_of(weights: Mapping[str, Tensor], asked: str) -> DINOHead:
    """The head that `weights`, by the names of `DINOHead`, are of. Raises UserError, whose message
    begins with `asked`, if they are not those of one.
    """
    layers = [v for n, v in weights.items() if n.startswith("mlp") and v.ndim == 2]
    last = next((v for n, v in weights.items() if n.startswith("last_layer") and v.ndim == 2), None)
    if not layers:
        raise UserError(f"{asked}: its projection head has no layers; get the file again.")
    prototypes = weights.get("last_layer.weight_v", weights.get("last_layer.weight", last))
    head = DINOHead(
        layers[0].shape[1],
        0 if prototypes is None else len(prototypes),
        hidden_dim=layers[0].shape[0],
        bottleneck_dim=layers[-1].shape[0],
        num_layers=len(layers),
        batch_norm=any(name.endswith("running_mean") for name in weights),
        plain="last_layer.weight" in weights,
    )
    own = head.state_dict()
    if why := misfit(own, weights):
        raise UserError(f"{asked}: its projection head is of another kind: {why}.")
    head.load_state_dict(dict(weights))
    return head


def find_heads(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Weights of "head" and "patch_head" by the names of `DINOHead`, as far as there are any."""
    heads: dict[str, dict[str, Tensors]] = {}
    for name, value in tensors.items():
        plain = WRAPPERS.sub("", name)
        if match := _NAME.search(plain):
            kind = "patch_head" if match[1] in _OF_PATCHES else "head"
            own = heads.setdefault(plain[: match.start()], {}).setdefault(kind, {})
            own[_WEIGHT_NORM.get(match[2], match[2])] = value
    if not heads:
        return {}
    chosen = heads[teachers([*heads])]
    both = chosen.get("head", {})
    second = {n: v for n, v in both.items() if n.startswith(("mlp2.", "last_layer2."))}
    if second:  # iBOT's: that of patches shares the layers that it has no second of
        first = {n: v for n, v in both.items() if n not in second}
        shared = first if not any(n.startswith("mlp2.") for n in second) else {}
        renamed = {n.replace("2.", ".", 1): v for n, v in second.items()}
        chosen |= {"head": first, "patch_head": shared | renamed}
    return chosen
