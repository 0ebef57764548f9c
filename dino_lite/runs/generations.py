"""`pretrain … generations=n`: Born-Again Networks without labels. The first generation is an
ordinary pretraining; each later one is a new network of the same architecture, distilled from the
one before (Furlanello et al. 2018, arXiv 1805.04770).
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch

from dino_lite.config import Config, compose, leaves, load, put
from dino_lite.contracts import Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.draws import derived_seed
from dino_lite.eval.lineage import compare_generations
from dino_lite.eval.results import short
from dino_lite.eval.store import FeatureStore
from dino_lite.machine import pick_accelerator
from dino_lite.meter import named
from dino_lite.planning.checks import check_values
from dino_lite.planning.plan import gather_facts, open_splits, plan
from dino_lite.planning.students import distill_config
from dino_lite.runs.begin import begin_config
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.pretraining import say
from dino_lite.runs.run import Run, merge_json
from dino_lite.runs.sequence import LAST, Sequence, Stage
from dino_lite.runs.trainer import check_launcher
from dino_lite.runs.trust import targets
from dino_lite.wording import aligned

STUDENT = "student"  # the name of a generation in its stage
_FIRST = "01_pretrain"


def run_generations(config: Config, arguments: list[str] | None = None) -> dict[str, Any]:
    """Train `config["generations"]` generations, one after another, and compare them after each.
    Returns the folder as "run", the path of the last generation and the results by stage.
    """
    config = absolute_paths(config)
    first = check_values(config | {"generations": 1})
    check_launcher(config)
    splits = open_splits(first["data"])
    sequence = Sequence("pretrain", config, splits.name, arguments)
    return sequence.run(_stages(config, first, splits, sequence))


def _stages(config: Config, first: Config, splits: Splits, sequence: Sequence) -> list[Stage]:
    start = first.get("checkpoint") or first["backbone"].get("pretrained")
    student = Path(str(start)).name if start else "new"
    stages = [Stage(_FIRST, first, student)]
    results = [sequence.folder / _FIRST]
    node = _architecture(sequence, first, splits)
    for generation in range(2, int(config["generations"]) + 1):
        name, teacher = f"{generation:02d}_generation", results[-1]
        own = _learning(first, generation)
        own = distill_config(own, str(teacher.absolute()), {STUDENT: node})
        results.append(sequence.folder / name / STUDENT)
        after = functools.partial(_compare, folders=results[:], config=first, splits=splits)
        title = str(teacher.relative_to(sequence.folder))
        stages.append(Stage(name, own, "new", title, f"{STUDENT}/{LAST}", after))
    return stages


def _architecture(sequence: Sequence, first: Config, splits: Splits) -> Config:
    """The backbone of the first generation, as its run has it or will have it, for new weights; as
    for other students, without drop path if that was left open.
    """
    file = sequence.at.run(_FIRST).config_file
    if file.is_file():
        planned = load(file)
    else:
        begun = begin_config(first)
        planned = plan(begun, gather_facts(begun, splits)).config
    node = {key: value for key, value in planned["backbone"].items() if key != "pretrained"}
    left_open = first["backbone"].get("drop_path") == "auto"
    return node | ({"drop_path": 0.0} if left_open else {})


def _learning(first: Config, generation: int) -> Config:
    """The configuration of a later generation, but for its networks: method, losses and crops are
    those of `dino-lite distill`, all else that of the first, with seeds of its own.
    """
    seed = first["seed"]
    own = derived_seed(seed, generation)
    bare = compose("distill", [f"seed={own}"])
    config = first | {"checkpoint": None, "method": bare["method"], "loss": bare["loss"]}
    config = put(config, "optim.clip_by", bare["optim"]["clip_by"])
    config |= {"augment": first["augment"] | {"num_local": 0, "gram_size": None}}
    config |= {"choices": first.get("choices", {}) | {"method": "distill"}}
    seeds = [key for key, value in leaves(config) if key.endswith("seed") and value == seed]
    for key in seeds:
        if not key.startswith(("data.", "callbacks.")):
            config = put(config, key, own)
    return config


def _compare(run: Run, folders: list[Path], config: Config, splits: Splits) -> dict[str, Any]:
    """Compare the generations in `folders`, of which the last was just trained: the result is kept
    in its results.json, and printed.
    """
    started, last = time.monotonic(), Run(folders[-1])
    accelerator = pick_accelerator(config["trainer"]["accelerator"], "trainer.accelerator")
    # The user's command names the same classes, so they are trusted.
    trust = [*(config.get("trust") or ()), *targets([config["backbone"], config["method"]])]
    opened = [
        open_backbone(find_checkpoint(str(folder), config["runs_dir"]), trust) for folder in folders
    ]
    workers = config["loader"]["num_workers"]
    workers = workers if isinstance(workers, int) else 0
    data = CleanData(splits, opened[-1].preprocessing, 256, workers)
    networks = [each.backbone.to(torch.device(accelerator)) for each in opened]
    try:
        with named(f"generation {len(networks)}"):
            found = compare_generations(networks, FeatureStore(data))
    except UserError as error:
        say(f"the generations were not compared: {error}")
        return {}
    about = {
        "data": splits.name,
        "image_size": data.preprocessing.pixels,
        "unreadable": len(data.bad),
        "seconds": round(time.monotonic() - started, 2),
    }
    found = about | found
    merge_json(
        last.results_file,
        lambda before: before | {"last": before.get("last", {}) | {"generations": found}},
    )
    say(f"generations ({found['protocol']}):\n{_text(found['table'])}")
    for warning in found.get("warnings", ()):
        say(f"warning: {warning}")
    return {"generations": found}


def _text(table: list[dict[str, Any]]) -> str:
    """A table as lines of text."""
    rows = [[*table[0]], *([short(value) for value in row.values()] for row in table)]
    return "\n".join(f"  {line}" for line in aligned(rows, ">"))
