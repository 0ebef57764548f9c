"""Replaces every "auto" in a configuration by a value that follows from the data and the machine,
and validates the result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dino_lite.config import Config, get, instantiate, leaves, put
from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data.facts import read_facts
from dino_lite.machine import Facts, has_compiler, has_fast_bf16, num_cores, pick_accelerator
from dino_lite.planning.checks import check, check_values
from dino_lite.planning.presets import SIZE, Rule, choose_backbone
from dino_lite.planning.rules import RULES
from dino_lite.planning.students import settle_objective


class Decision(NamedTuple):
    """A value that was chosen automatically, and the reason."""

    key: str
    value: Any
    reason: str


class Plan(NamedTuple):
    """A configuration without "auto", and the decisions that led to it."""

    config: Config
    decisions: list[Decision]

    def table(self) -> str:
        """The decisions as text, one per line."""
        width = max((len(f"{d.key}={d.value}") for d in self.decisions), default=0)
        return "\n".join(f"  {f'{d.key}={d.value}':{width}}  {d.reason}" for d in self.decisions)


def open_splits(node: Config) -> Splits:
    """Open the data set that `node` configures. Raises UserError if it does not return Splits."""
    splits: Any = instantiate(node)
    sources = [splits.train, splits.test] if isinstance(splits, Splits) else [splits]
    for source in sources:
        if source is not None and not isinstance(source, Source):
            raise UserError(
                f"data._target_={node['_target_']}: it must return dino_lite.contracts.Splits of "
                f"Source, not {type(source).__qualname__}."
            )
    opened: Splits = splits
    return opened


def gather_facts(config: Config, splits: Splits) -> Facts:
    """Collect the facts of the data and of this machine."""
    wanted = pick_accelerator(get(config, "trainer.accelerator"), "trainer.accelerator")
    return Facts(
        source=splits.name,
        **read_facts(splits)._asdict(),
        accelerator=wanted,
        device_name=torch.cuda.get_device_name() if wanted == "cuda" else wanted,
        num_devices=torch.cuda.device_count() if wanted == "cuda" else 1,
        num_cores=num_cores(),
        bf16=has_fast_bf16(wanted),
        compiler=has_compiler(wanted),
    )


def plan(config: Config, facts: Facts) -> Plan:
    """Replace every "auto" in `config`. A pure function of configuration and facts; rules are
    applied in order and may read the results of earlier ones. Raises UserError if no rule covers a
    key, or if the result is invalid.
    """
    config = check_values(config)
    decisions: list[Decision] = []
    config = _settle(config, facts, SIZE, decisions)
    if config.get("students"):
        config, settled = settle_objective(config)
        decisions += [Decision(*each) for each in settled]
    elif (choice := choose_backbone(config, facts)) is not None:
        config = put(config, "backbone", choice.node)
        decisions.append(Decision("backbone", choice.name, choice.reason))
    config = _settle_students(_settle(config, facts, RULES, decisions), facts, decisions)
    left = [key for key, value in leaves(config) if value == "auto" and not _keeps_auto(key)]

    config = _settle_students(_settle(config, facts, RULES, decisions), facts, decisions)
    left = [key for key, value in leaves(config) if value == "auto" and not _keeps_auto(key)]
    if left:
        raise UserError(f"{left[0]}=auto: this key has no automatic value; set it explicitly.")
    check(config, facts)
    return Plan(config, decisions)


def _settle(
    config: Config, facts: Facts, rules: dict[str, Rule], decisions: list[Decision]
) -> Config:
    """Apply `rules` to the keys of `config` that are "auto", and append to `decisions`."""
    for key, rule in rules.items():
        if dict(leaves(config)).get(key) == "auto":  # the key may not exist in another choice
            value, reason = rule(config, facts)
            config = put(config, key, value)
            decisions.append(Decision(key, value, reason))
    return config


def _settle_students(config: Config, facts: Facts, decisions: list[Decision]) -> Config:
    """Settle the backbone of each student, if there are any; the others' keys are settled."""
    planned: Config = {}
    for name, node in (config.get("students") or {}).items():
        own: list[Decision] = []
        planned[name] = _settle(config | {"backbone": node}, facts, RULES, own)["backbone"]
        decisions += [
            each._replace(key=f"students.{name}.{each.key.removeprefix('backbone.')}")
            for each in own
        ]
    return config | {"students": planned} if planned else config


def _keeps_auto(key: str) -> bool:
    """Whether what reads the key takes "auto" itself: the name, and the labels of any data set."""
    return key == "name" or (key.startswith("data.") and key.endswith(".labels"))
