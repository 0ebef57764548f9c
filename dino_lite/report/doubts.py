"""Caveats that a reader should know before trusting the numbers; `eval.verdict` judges these."""

from __future__ import annotations

from collections.abc import Iterator

from dino_lite.eval.verdict import unreadable_line
from dino_lite.report.story import Story, results_of


def doubts(story: Story) -> list[str]:
    """The caveats as sentences, most serious first."""
    return [
        *_unfinished(story),
        *_skipped(story),
        *_alarms(story),
        *_unreadable(story),
        *story.missing,
    ]


def _unfinished(story: Story) -> Iterator[str]:
    if not story.is_run or story.results.get("finished"):
        return
    if story.results.get("trained"):
        yield "Pictures or baselines are missing: the command below adds them without training."
        return
    steps, progress = (story.curves.get(name) for name in ("loss", "progress"))
    where = "before its first logged step"
    if steps is not None:
        where = f"at step {int(steps[-1, 0]) + 1:,}"
        if progress is not None:
            where += f" ({100 * progress[-1, 1]:.0f} %)"
    yield (
        f"The run is not finished: it is {where}. The command below resumes it from its last "
        "checkpoint."
    )


def _skipped(story: Story) -> Iterator[str]:
    skipped = story.curves.get("skipped")
    if skipped is not None and (most := int(skipped[:, 1].max())):
        yield (
            f"Up to {most} consecutive optimizer step{'' if most == 1 else 's'} had a non-finite "
            "gradient and were skipped: a lower optim.rate or trainer.precision=32 may help."
        )


def _alarms(story: Story) -> Iterator[str]:
    """Warnings that the run issued during training (Run.add_warnings), unless the verdict holds
    them.
    """
    if story.results.get("trained") or story.results.get("finished"):
        return
    for warning in story.results.get("warnings") or ():
        yield f"At step {warning['step']:,}, {warning['text']}"


def _unreadable(story: Story) -> Iterator[str]:
    if line := unreadable_line(len(story.bad_files)):
        yield line
    for result in results_of(story.results):
        if num := result.found.get("unreadable"):
            yield (
                f"{result.found['metric']} ({result.name}) excludes {num:,} "
                f"image{'' if num == 1 else 's'} that could not be read."
            )
