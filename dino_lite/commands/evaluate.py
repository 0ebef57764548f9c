"""`dino-lite evaluate`: evaluates a frozen backbone on a data set by one or more evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dino_lite.config import Config, command, compose
from dino_lite.contracts import Evaluation
from dino_lite.distributed import rank
from dino_lite.eval.baselines import baselines_of
from dino_lite.eval.gallery import PICTURES, draw_on_all_ranks
from dino_lite.eval.measure import beside, comparable, measure
from dino_lite.planning.checks import check_values
from dino_lite.report.terminal import print_results
from dino_lite.runs.checkpoint import find_checkpoint
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.subject import build_evaluations, open_subject, save_results


def evaluate(*overrides: str) -> dict[str, Any]:
    """Evaluate as `dino-lite evaluate OVERRIDES` does; returns the results by evaluation."""
    return run_evaluate(compose("evaluate", overrides))


def run_evaluate(config: Config) -> dict[str, Any]:
    """Evaluate, print the results and merge them into the checkpoint's results.json."""
    config = check_values(absolute_paths(config), auto=False)
    evaluations = build_evaluations(config)
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    subject = open_subject(config, checkpoint, evaluations)
    data = subject.store.data
    if rank() == 0:
        title = f"{subject.checkpoint} on {data.splits.name}, {data.size} pixels"
        print("\n".join([*subject.notes, title]), flush=True)
    results = measure(subject.backbone, subject.store, evaluations)
    if config["baselines"]:
        others = comparable(evaluations)
        baselines = baselines_of(subject.backbone, data, int(config["seed"]))
        measured = {each.title: measure(each.build(), subject.store, others) for each in baselines}
        results = beside(results, measured)
    if rank() == 0:
        save_results(results, subject)
        print(f"written to {subject.checkpoint.results_file}")
        print_results({"": results})
    if config["pictures"] is not None:
        own = {
            name: each.draw
            for name, each in evaluations.items()
            if type(each).draw is not Evaluation.draw
        }
        folder = Path(config["pictures"])
        drawn = draw_on_all_ranks(subject.backbone, subject.store, folder, PICTURES | own, print)
        if rank() == 0:
            print(f"drawn into {folder}: {', '.join(path.name for path in drawn.values())}")
    return results


@command("evaluate")
def main(config: Config) -> None:
    """Command line."""
    run_evaluate(config)


if __name__ == "__main__":
    main()
