"""A method with fresh weights, from a planned configuration."""

from __future__ import annotations

import torch

from dino_lite.backbones.spec import check_spec
from dino_lite.config import Config, instantiate
from dino_lite.formats.weights import load_pretrained
from dino_lite.methods.method import Method


def fresh_method(config: Config, pretrained: str | None = None) -> Method:
    """The method of a planned configuration, weights drawn from its seed; those of the backbone are
    read from the file `pretrained` where that is given.
    """
    torch.manual_seed(int(config["seed"]))
    network = {key: value for key, value in config["backbone"].items() if key != "pretrained"}
    make_method, backbone = instantiate(config["method"]), check_spec(instantiate(network))
    if pretrained:
        load_pretrained(backbone, pretrained)
    method = make_method(backbone=backbone)
    assert isinstance(method, Method)
    return method.double() if str(config["trainer"]["precision"]) == "64" else method
