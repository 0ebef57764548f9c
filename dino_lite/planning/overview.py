"""A planned run in a few lines: what was chosen, why, and a setting that changes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dino_lite.config import Config, get
from dino_lite.contracts import Backbone
from dino_lite.machine import Facts
from dino_lite.planning.checks import setting
from dino_lite.planning.plan import Plan
from dino_lite.wording import count

_PRECISIONS = {"32": "float32", "64": "float64", "bf16": "bfloat16"}


def network_size(backbone: Backbone) -> dict[str, int]:
    """The width of a backbone's features (its class token), and its number of parameters."""
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    return {"features": backbone.embed_dim, "parameters": parameters}


def embedded(config: Config) -> list[str]:
    """The sentence that says so if the data are the embedded set because no other were named."""
    data = config["data"]
    if data.get("root") or not str(data["_target_"]).endswith(".open_auto"):
        return []
    return [
        "No data.root was given, so the data are the embedded set of drawn shapes: dino-lite "
        "pretrain FOLDER trains on your own images."
    ]


def overview(
    plan: Plan, facts: Facts, network: Mapping[str, int] | None = None, labels_from: str = ""
) -> str:
    """Eight lines about a plan, nine if it has decisions. `network` is as returned by
    `network_size`; `labels_from` says where the labels of the data come from.
    """
    config = plan.config
    reasons = {each.key: each.reason for each in plan.decisions if each.value is not None}

    def line(title: str, what: str, example: str, *keys: str) -> str:
        why = next((f" ({reasons[key]})" for key in keys if key in reasons), "")
        return f"  {title:9}{what}{why}{example and f' [{example}]'}"

    sizes = facts.sizes or f"about {facts.width}x{facts.height} pixels"
    data = f"{facts.source}: {count(facts.num_images, 'image')}"
    labels = count(facts.num_classes, "class") if facts.num_classes else "none"
    labels += f" ({labels_from})" if labels_from else ""
    devices = get(config, "trainer.devices") * get(config, "trainer.num_nodes")
    device = f"{devices} × {facts.device_name}" if devices > 1 else facts.device_name
    precision = _PRECISIONS.get(kind := str(get(config, "trainer.precision")), kind)
    more = "trainer.devices=2" if facts.num_devices > devices else ""
    name, losses = _method(config)
    size, batch = get(config, "augment.global_size"), get(config, "loader.batch_size")
    step = math.lcm(16, setting(config, "backbone.patch_size", 1))
    larger = math.ceil(1.5 * size / step) * step
    other = "dino" if name == "dinov2" else "dinov2"
    example = "students=[vit_tiny]" if config.get("students") else "backbone=vit_small"
    test = f", {count(facts.num_test, 'test image')}" if facts.num_test else ""
    lines = [
        line("data", f"{data} of {sizes}{test}", ""),
        line("labels", labels, "data.labels=none" if facts.num_classes else ""),
        line("device", f"{device}, {precision}", more, "trainer.precision"),
        line("network", _network(config, network), example, "backbone", *_SIZES),
        line("method", f"{name}, {losses}", f"method={other}", "method.head.num_prototypes"),
        line("crops", _crops(config), f"augment.global_size={larger}", "augment.global_size"),
        line(
            "batch",
            count(batch, "image"),
            f"loader.batch_size={2 * batch}",
            "loader.batch_size",
        ),
        line("length", length(config), "trainer.max_time=2h", *_LENGTHS),
    ]
    if plan.decisions:
        full = f"plan=full lists all {len(plan.decisions)} automatic choices and their reasons"
        lines.append(f"  Add KEY=VALUE, as in brackets, to change any of this; {full}.")
    return "\n".join(lines)


_SIZES = ("backbone.name", "backbone.embed_dim")
_LENGTHS = ("trainer.max_time", "trainer.max_epochs")


def _network(config: Config, network: Mapping[str, int] | None) -> str:
    """The backbone's name with its feature width and number of parameters; or what students are to
    learn from whom.
    """
    if students := config.get("students"):
        teacher = config["teacher"]["checkpoint"]
        return f"students {', '.join(students)} of {teacher}"
    node = config["backbone"]
    name = str(node.get("name") or node["_target_"].rpartition(".")[2])
    if network is None:
        return name
    num = network["parameters"]
    many = f"{num / 1e3:,.0f} thousand" if num < 1e6 else f"{num / 1e6:,.1f} million"
    return f"{name}, {network['features']:,} features, {many} parameters"


def _method(config: Config) -> tuple[str, str]:
    """The method's name; its losses and number of prototypes."""
    target = str(config["method"]["_target_"]).rpartition(".")[2].lower()
    prototypes = (config["method"].get("head") or {}).get("num_prototypes")
    many = f", {prototypes:,} prototypes" if prototypes else ""
    losses = f"loss {' + '.join(config['loss'] or {})}{many}"
    return config.get("choices", {}).get("method", target), losses


def _crops(config: Config) -> str:
    """Number and size of the crops, and of the patches in them."""
    augment, patch = config["augment"], setting(config, "backbone.patch_size")
    local = (
        f" and {augment['num_local']} of {augment['local_size']}" if augment["num_local"] else ""
    )
    patches = f", patches of {patch}" if patch else ""
    return f"2 of {augment['global_size']}{local} pixels{patches}"


def length(config: Config) -> str:
    """The length of the run in its own measure."""
    trainer: dict[str, Any] = config["trainer"]
    if trainer["max_time"] is not None:
        return str(trainer["max_time"])
    if trainer["max_steps"] is not None:
        return count(trainer["max_steps"], "step")
    return count(trainer["max_epochs"], "epoch")
