"""`dino-lite evaluate`: evaluates a frozen backbone on a data set by one or more evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dino_lite.config import Config, command, compose
from dino_lite.contracts import Evaluation
from dino_lite.distributed import rank
from dino_lite.eval.baselines import baselines_of
from dino_lite.eval.gallery import PICTURES, draw_on_all_ranks
from dino_lite.eval.measure import beside, comparable, line, measure
from dino_lite.interrupts import interrupt, on_stop
from dino_lite.meter import named
from dino_lite.planning.checks import check_values
from dino_lite.report.terminal import print_results
from dino_lite.runs.checkpoint import find_checkpoint
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.subject import Subject, build_evaluations, open_subject, save_results


def evaluate(*overrides: str) -> dict[str, Any]:
    """Evaluate as `dino-lite evaluate OVERRIDES` does; returns the results by evaluation."""
    return run_evaluate(compose("evaluate", overrides))


def run_evaluate(config: Config) -> dict[str, Any]:
    """Evaluate, print the results and merge them into the checkpoint's results.json, each as soon
    as it is known: an interrupt loses only the evaluation that it interrupts.
    """
    config = check_values(absolute_paths(config), auto=False)
    evaluations = build_evaluations(config)
    checkpoint = find_checkpoint(config["checkpoint"], config["runs_dir"])
    subject = open_subject(config, checkpoint, evaluations)
    data = subject.store.data
    if rank() == 0:
        title = f"{subject.checkpoint} on {data.splits.name}, {data.preprocessing.pixels} pixels"
        print("\n".join([*subject.notes, title]), flush=True)
    results: dict[str, dict[str, Any]] = {}
    try:
        with on_stop(interrupt):
            _measure(subject, evaluations, config, results)
    except KeyboardInterrupt:
        if rank() == 0:
            print(_left_out(results, evaluations, subject, config["baselines"]), flush=True)
        raise
    if rank() == 0:
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


def _measure(
    subject: Subject,
    evaluations: dict[str, Evaluation],
    config: Config,
    results: dict[str, dict[str, Any]],
) -> None:
    """Fill `results`, saving and printing each when it is made: the backbone's own, then those of
    its baselines.
    """
    several = len(evaluations) > 1 or config["baselines"]  # else the table says it at once

    def keep(name: str, found: dict[str, Any]) -> None:
        results[name] = found
        if rank() == 0:
            save_results({name: found}, subject)
            if several:
                print(line(name, found), flush=True)

    measure(subject.backbone, subject.store, evaluations, keep)
    if not config["baselines"]:
        return
    for baseline in baselines_of(subject.backbone, subject.store.data, int(config["seed"])):

        def keep_beside(name: str, found: dict[str, Any], title: str = baseline.title) -> None:
            results[name] = beside(results[name], title, found)
            if rank() == 0:
                save_results({name: results[name]}, subject)
                print(line(f"{name} of {title}", found), flush=True)

        with named(baseline.title):
            measure(baseline.build(), subject.store, comparable(evaluations), keep_beside)


def _left_out(
    results: dict[str, Any], asked: dict[str, Evaluation], subject: Subject, baselines: bool
) -> str:
    """A sentence on what an interrupted evaluation kept, and how to measure the rest."""
    missing = [name for name in asked if name not in results]
    others = [
        f"{name} of {title}" for name in results for title in results[name].get("baselines", ())
    ]
    told = [*results, *others]
    kept = f"{', '.join(told)} kept in {subject.checkpoint.results_file}; " if told else ""
    how = f"eval=[{','.join(asked if baselines else missing)}]"
    if baselines:
        missing.append("the other baselines" if others else "baselines")
        how += " baselines=true"
    return f"interrupted: {kept}{', '.join(missing)} not measured ({how} does that)."


@command("evaluate")
def main(config: Config) -> None:
    """Command line."""
    run_evaluate(config)


if __name__ == "__main__":
    main()
