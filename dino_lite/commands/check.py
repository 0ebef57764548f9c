"""`dino-lite check`: open the data → plan → inspect every image → time a run → report."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from dino_lite.config import Config, command, compose, get, put
from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data.findings import (
    Finding,
    judge_classes,
    judge_duplicates,
    judge_files,
    judge_pixels,
    judge_speed,
)
from dino_lite.data.inspection import Inspected, inspect
from dino_lite.data.labeled import labels_told
from dino_lite.data.names import file_name, safe_name
from dino_lite.data.pack import check_target, write_shards
from dino_lite.data.parts import append_rows
from dino_lite.data.statistics import (
    Groups,
    describe,
    describe_duplicates,
    find_groups,
    repeated,
)
from dino_lite.data.subset import spread
from dino_lite.data.summary import class_table, duplicate_table, speed_table, split_table
from dino_lite.eval.pictures import crops_picture
from dino_lite.machine import Facts, num_cores
from dino_lite.meter import meter
from dino_lite.methods.clock import Clock
from dino_lite.planning.checks import check_values
from dino_lite.planning.overview import embedded, network_size, overview
from dino_lite.planning.plan import Plan, gather_facts, open_splits, plan
from dino_lite.runs.begin import begin_config
from dino_lite.runs.build import build
from dino_lite.runs.identity import absolute_paths
from dino_lite.runs.run import Run, write_json
from dino_lite.runs.timing import compare, time_loading, time_training
from dino_lite.wording import count

_TIMED_BATCH = 16  # images loaded for timing
_WRITTEN = ("check.json", "bad_files.csv", "duplicates.csv", "crops.png")

Found = dict[str, tuple[Int[np.ndarray, "n"], Inspected]]  # by split: image indices, inspection


def check(*overrides: str) -> dict[str, Any]:
    """Check the data as `dino-lite check OVERRIDES` does; returns the content of check.json."""
    return run_check(compose("check", overrides))


def run_check(config: Config) -> dict[str, Any]:
    """Check the data, print the report and write it to `out`; "ok" is False if a run would fail."""
    started = time.monotonic()
    config = check_values(begin_config(absolute_paths(config)))
    if config["pack"]:
        check_target(Path(config["pack"]))
    splits = open_splits(config["data"])
    out = Path(config["out"] or Path("checks") / file_name(safe_name(splits.name, "-._")))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"out={out} cannot be created ({error.strerror}): choose another folder."
        raise UserError(why) from error
    planned, facts, refusal = _plan(config, splits)
    hashing = find_spec("imagehash") is not None
    found = _inspect(config, splits, hashing)
    config = config if planned is None else planned.config
    for name in _WRITTEN:
        (out / name).unlink(missing_ok=True)
    groups = find_groups(np.concatenate([part.rows for _, part in found.values()]), hashing)
    report = _describe(config, splits, found)
    report["duplicates"] = describe_duplicates(groups, len(found["train"][0]), hashing)
    report["plan"] = None if planned is None else [d._asdict() for d in planned.decisions]
    report["network"] = report["speed"] = None
    if facts is not None:
        try:
            report["network"], report["speed"] = _measure(config, facts, splits, out)
        except UserError as error:
            refusal = str(error)
    findings = [*_judge(report, config, refusal)]
    findings += [Finding("warning", sentence) for sentence in splits.left_out]
    report["findings"] = [finding._asdict() for finding in findings]
    report["ok"] = all(finding.level != "error" for finding in findings)
    report["seconds"] = round(time.monotonic() - started, 1)
    _say(report, planned, facts, splits)
    _write(report, out, splits, found, groups)
    if config["pack"]:
        _pack(splits, Path(config["pack"]))
    return report


def _sources(splits: Splits) -> list[tuple[str, Source]]:
    """The existing splits with their names."""
    named = [("train", splits.train), ("test", splits.test)]
    return [(name, source) for name, source in named if source is not None]


def _plan(config: Config, splits: Splits) -> tuple[Plan | None, Facts | None, str]:
    """The plan and facts of pretrain, or the message of the error it would raise."""
    try:
        facts = gather_facts(config, splits)
        return plan(config, facts), facts, ""
    except UserError as error:
        return None, None, str(error)


def _inspect(config: Config, splits: Splits, hashing: bool) -> Found:
    """Inspect every image of every split, or `max_images` of each."""
    most, workers = config["max_images"], config["loader"]["num_workers"]
    asked = {name: spread(len(source), most or len(source)) for name, source in _sources(splits)}
    if workers == "auto":  # unlike in a run, workers may use all cores
        workers = num_cores()
    total = sum(map(len, asked.values()))
    with meter(total, "inspection") as progress:
        return {
            name: (
                asked[name],
                inspect(source, asked[name], min(workers, total // 256), hashing, progress),
            )
            for name, source in _sources(splits)
        }


def _describe(config: Config, splits: Splits, found: Found) -> dict[str, Any]:
    """The part of the report about individual images and labels."""
    size = get(config, "augment.global_size")
    described = {
        name: describe(source, found[name][1], 0 if size == "auto" else size)
        for name, source in _sources(splits)
    }
    return {"data": splits.name, "splits": described, "labels": labels_told(splits)}


def _measure(
    config: Config, facts: Facts, splits: Splits, out: Path
) -> tuple[dict[str, int], dict[str, Any]]:
    """The size of the network, and loading and training speed of the planned run; write crops.png.
    Raises UserError as pretrain does.
    """
    trainer, loader = config["trainer"], config["loader"]
    num_devices = trainer["devices"] * trainer["num_nodes"]
    batch_size = loader["batch_size"] // num_devices
    small = min(_TIMED_BATCH, batch_size)
    timed = put(put(config, "loader.num_workers", 0), "loader.batch_size", small)
    length = {"max_steps": 10**9, "max_epochs": None, "max_time": None}
    # Compiling a graph for each timed size would take minutes.
    timed |= {"trainer": trainer | length | {"compile": False}, "callbacks": None}
    datamodule, module, _ = build(timed, facts, splits, Run(out))
    network = network_size(module.method.export_backbone())
    datamodule.bad_files.path = None  # they are listed already
    loaded = time_loading(datamodule)
    crops = datamodule.on_after_batch_transfer(loaded.batch, 0)
    crops_picture(crops, datamodule.normalize, out / "crops.png")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(trainer["num_threads"])
        device = torch.device(facts.accelerator)
        training = time_training(datamodule, module, loaded, batch_size, device)
    finally:
        torch.set_num_threads(threads)
    speed = compare(
        loaded,
        training,
        batch_size=batch_size,
        num_devices=num_devices,
        num_workers=loader["num_workers"] * num_devices,
        num_cores=facts.num_cores * trainer["num_nodes"],
        num_images=facts.num_images,
        num_epochs=Clock.of(trainer, facts.num_images, loader["batch_size"]).num_epochs,
    )
    return network, speed | {"device": facts.device_name}


def _judge(report: dict[str, Any], config: Config, refusal: str) -> Iterator[Finding]:
    """All findings, errors first."""
    if refusal:
        yield Finding("error", f"dino-lite pretrain would fail: {refusal}")
    train, test = report["splits"]["train"], report["splits"].get("test")
    for name, split in report["splits"].items():
        yield from judge_files(name, split, config["loader"]["max_bad_fraction"])
    if report["plan"] is not None:
        size, batch_size = config["augment"]["global_size"], config["loader"]["batch_size"]
        yield from judge_pixels(train, batch_size, size)
    yield from judge_classes(train, test)
    num = sum(split["num_readable"] for split in report["splits"].values())
    yield from judge_duplicates(report["duplicates"], num)
    if report["speed"] is not None:
        yield from judge_speed(report["speed"])


def _say(report: dict[str, Any], planned: Plan | None, facts: Facts | None, splits: Splits) -> None:
    """Print the report."""
    train = report["splits"]["train"]
    for name, split in report["splits"].items():
        print(split_table(name, split))
    print(class_table(train, report["labels"]))
    print(duplicate_table(report["duplicates"]))
    if planned is not None and facts is not None:
        print("\nthe run on this data (dino-lite pretrain, same keys):")
        print(overview(planned, facts, report["network"], splits.labels_from))
        if planned.config["plan"] == "full":
            print(f"all automatic choices:\n{planned.table()}")
        print("\n".join(["", *(f"{n}\n" for n in [*splits.left_out, *embedded(planned.config)])]))
    if report["speed"] is not None:
        print(speed_table(report["speed"]))
    for finding in report["findings"]:
        print(f"{finding['level']}: {finding['text']}")
    print("a run would fail" if not report["ok"] else "a run can start")


def _write(report: dict[str, Any], out: Path, splits: Splits, found: Found, groups: Groups) -> None:
    """Write check.json, and bad_files.csv and duplicates.csv if they are not empty."""
    write_json(out / "check.json", report)
    bad = [part["unreadable"] for part in report["splits"].values()]
    rows = [(image["path"], image["reason"]) for images in bad for image in images]
    if rows:
        append_rows(out / "bad_files.csv", ("path", "reason"), rows)
    names = [
        (name, source, index)
        for name, source in _sources(splits)
        for index in found[name][0].tolist()
    ]
    listed = repeated(groups)
    if listed:
        with open(out / "duplicates.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("group", "kind", "split", "path"))
            for group, kind, row in listed:
                name, source, index = names[row]
                writer.writerow((group, kind, name, source.name(index)))
    print(f"written to {out} in {report['seconds']:.0f} s")


def _pack(splits: Splits, folder: Path) -> None:
    """Write the data as tar shards, and print how to train on them."""
    total = sum(len(source) for _, source in _sources(splits))
    with meter(total, "packing") as progress:
        shards = write_shards(splits, folder, progress=progress)
    print(f"{count(len(shards), 'shard')} in {folder}: dino-lite pretrain data.root={folder}")


@command("check")
def main(config: Config) -> None:
    """Command line."""
    if not run_check(config)["ok"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
