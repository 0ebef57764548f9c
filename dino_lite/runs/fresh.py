"""Builds a method with fresh weights from a planned configuration."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dino_lite.backbones.spec import check_spec
from dino_lite.config import Config, instantiate
from dino_lite.contracts import Backbone, UserError
from dino_lite.formats.head_weights import load_heads
from dino_lite.formats.weights import load_pretrained, read_weights
from dino_lite.methods.frozen import FrozenTeacher
from dino_lite.methods.method import Method
from dino_lite.planning.checks import read_by, traits_of
from dino_lite.settings.validate import locate_class


def fresh_method(
    config: Config, pretrained: str | None = None, teacher: FrozenTeacher | None = None
) -> Method:
    """Build the method of a planned configuration, with weights drawn from its seed. If given,
    `pretrained` names the file whose weights the backbone gets, and the heads where they fit;
    `students` learn from `teacher`. Raises UserError if `backbone` or `method` names another kind
    of class.
    """
    if config.get("students"):
        return _of_students(config, teacher)
    locate_class(config["backbone"], "backbone", Backbone)
    locate_class(config["method"], "method", Method)
    torch.manual_seed(int(config["seed"]))
    make_method, backbone = instantiate(config["method"]), fresh_backbone(config)
    content = read_weights(pretrained) if pretrained else None
    fit = load_pretrained(backbone, pretrained, content) if pretrained else None
    method = make_method(backbone=backbone)
    assert isinstance(method, Method)
    if content is not None and fit is not None:
        method.notes = (*fit.notes(), *load_heads(method, content.tensors))
    return _in_precision(method, config)


def _of_students(config: Config, teacher: FrozenTeacher | None) -> Method:
    """The method of several students, each with its backbone, and heads for what losses read."""
    locate_class(config["method"], "method", Method)
    torch.manual_seed(int(config["seed"]))
    backbones = {}
    for name, node in config["students"].items():
        locate_class(node, f"students.{name}", Backbone)
        backbones[name] = fresh_backbone(config | {"backbone": node})
    reads = [read_by(name, loss) for name, loss in config["loss"].items()]
    method = instantiate(config["method"])(backbone=backbones, teacher=teacher, reads=reads)
    assert isinstance(method, Method)
    return _in_precision(method, config)


def fresh_backbone(config: Config) -> Backbone:
    """The backbone of a planned configuration with fresh weights. Raises UserError."""
    network = {key: value for key, value in config["backbone"].items() if key != "pretrained"}
    backbone = check_spec(instantiate(network))
    _check_mixing(backbone, config)
    return backbone


def _in_precision(method: Method, config: Config) -> Method:
    return method.double() if str(config["trainer"]["precision"]) == "64" else method


def _check_mixing(backbone: Backbone, config: Config) -> None:
    """Check that a backbone with batch normalization declares it, since its results depend on the
    micro-batch size. Raises UserError.
    """
    mixes = any(isinstance(part, _BatchNorm) for part in backbone.modules())
    if mixes and not traits_of(config).mixes_images:
        family = type(backbone)
        raise UserError(
            f"{family.__module__}.{family.__qualname__} contains batch normalization, but its "
            "traits have mixes_images=False: let its class method traits return "
            "Traits(mixes_images=True) for these settings."
        )
