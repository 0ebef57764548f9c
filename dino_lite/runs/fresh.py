"""Builds a method with fresh weights from a planned configuration."""

from __future__ import annotations

import torch

from dino_lite.backbones.spec import check_spec
from dino_lite.config import Config, instantiate
from dino_lite.contracts import Backbone
from dino_lite.formats.weights import load_pretrained
from dino_lite.methods.method import Method
from dino_lite.settings.validate import locate_class


def fresh_method(config: Config, pretrained: str | None = None) -> Method:
    """Build the method of a planned configuration, with weights drawn from its seed. If given,
    `pretrained` names the file that the backbone's weights are read from. Raises UserError if
    `backbone` or `method` names another kind of class.
    """
    locate_class(config["backbone"], "backbone", Backbone)
    locate_class(config["method"], "method", Method)
    torch.manual_seed(int(config["seed"]))
    network = {key: value for key, value in config["backbone"].items() if key != "pretrained"}
    make_method, backbone = instantiate(config["method"]), check_spec(instantiate(network))
    if pretrained:
        load_pretrained(backbone, pretrained)
    method = make_method(backbone=backbone)
    assert isinstance(method, Method)
    return method.double() if str(config["trainer"]["precision"]) == "64" else method
