#!/usr/bin/env python3
"""Measure the memory that a list of millions of images costs each worker, forked and spawned.

    scripts/measure_paths.py --num 5000000 --workers 2 --json FILE

Names have the form of ImageNet's, in 1,000 folders, about 60 bytes each including the folder; no
file exists. Every worker reads 200,000 random paths and all labels; the cost is the increase of its
memory. Private: pages of this process only (USS). PSS: plus a share of each page shared with other
processes. RSS: shared pages in full. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import resource
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from dino_lite.data.labels import Split, find_labels
from dino_lite.data.paths import PathList
from dino_lite.data.sources import PathSource

NUM_FOLDERS = 1000
NUM_READ = 200_000
MB = 1e6


def memory() -> dict[str, float]:
    """Private, PSS and RSS of this process, in MB."""
    kilobytes = {"Private": 0, "Pss": 0, "Rss": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, number = line.split()[:2]
        name = key.rstrip(":").partition("_")[0]
        if name in kilobytes and not key.startswith("Pss_"):
            kilobytes[name] += int(number)
    return {name.lower(): number * 1024 / MB for name, number in kilobytes.items()}


def listed(num: int) -> tuple[PathSource, dict[str, float]]:
    """A source of `num` nonexistent images, and the seconds it took to build."""
    start = time.perf_counter()
    collected = PathList()
    for folder in range(NUM_FOLDERS):
        rows = range(folder, num, NUM_FOLDERS)
        name = b"n%08d" % folder
        names = [b"%s_%09d_resized.JPEG" % (name, row) for row in rows]
        collected.add_names(name + b"-common_name_of_it/", names)
    paths = collected.paths()
    collected_at = time.perf_counter()
    labels = find_labels("folder", [Split(b"/data", b"train/", paths)], [])
    labeled_at = time.perf_counter()
    source = PathSource(b"/data/train", paths, labels.train, labels.classes)
    shared_at = time.perf_counter()
    source.digest()
    took = {
        "collect_seconds": collected_at - start,
        "labels_seconds": labeled_at - collected_at,
        "share_labels_seconds": shared_at - labeled_at,
        "digest_seconds": time.perf_counter() - shared_at,
    }
    return source, took


def work(source: PathSource | bytes, together: Barrier, answer: Any) -> None:
    """A worker: reports the increase of its memory from using the source."""
    before = memory()
    mine = pickle.loads(source) if isinstance(source, bytes) else source
    rows = np.random.default_rng(os.getpid()).integers(0, len(mine), NUM_READ)
    for row in rows:
        mine.path(int(row))
    assert mine.labels is not None
    int(mine.labels.sum())
    del rows
    together.wait()  # all workers have mapped the pages they use
    after = memory()
    together.wait()
    answer.put({key: after[key] - before[key] for key in after})


def cost(source: PathSource, how: str, num_workers: int) -> dict[str, float]:
    """Largest cost over the workers, in MB."""
    context = multiprocessing.get_context(how)
    together, answer = context.Barrier(num_workers), context.Queue()
    given: PathSource | bytes = pickle.dumps(source) if how == "spawn" else source
    workers = [
        context.Process(target=work, args=(given, together, answer)) for _ in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    found = [answer.get() for _ in workers]
    for worker in workers:
        worker.join()
    return {key: round(max(item[key] for item in found), 1) for key in found[0]}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=5_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
    source, took = listed(asked.num)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
    arrays = (*vars(source.paths).values(), source.labels)
    files = [getattr(array, "file", None) for array in arrays]
    found = {
        "num_paths": asked.num,
        "num_workers": asked.workers,
        "bytes_per_path": len(source.paths[asked.num // 2]),
        "files_mb": round(sum(os.path.getsize(f) for f in files if f) / MB, 1),
        "pickle_bytes": len(pickle.dumps(source)),
        "parent_peak_mb": round(peak - before, 1),
        **{name: round(seconds, 2) for name, seconds in took.items()},
        **{f"{how}_mb": cost(source, how, asked.workers) for how in ("fork", "spawn")},
    }
    for name, value in found.items():
        print(f"{name:22s} {value}")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
