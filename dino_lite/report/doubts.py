"""Caveats that a reader should know before trusting the numbers; `eval.verdict` judges these."""

from __future__ import annotations

from collections.abc import Iterator

from dino_lite.eval.verdict import alarms, skipped_line, unreadable_line
from dino_lite.report.story import Story, results_of
from dino_lite.wording import count


def doubts(story: Story) -> list[str]:
    """The caveats as sentences, most serious first."""
    return [
        *_unfinished(story),
        *_skipped(story),
        *_alarms(story),
        *_of_results(story),
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
    line = skipped_line(story.results, story.curves)
    if line and not _is_judged(story):
        yield line


def _alarms(story: Story) -> Iterator[str]:
    """Warnings that the run issued during training (Run.add_warnings)."""
    if not _is_judged(story):
        yield from alarms(story.results)


def _is_judged(story: Story) -> bool:
    """Whether the verdict stands in the report: it holds warnings and skipped steps."""
    return bool(story.results.get("trained") or story.results.get("finished"))


def _of_results(story: Story) -> Iterator[str]:
    """Warnings that evaluations gave."""
    for result in results_of(story.results):
        for warning in result.found.get("warnings") or ():
            yield f"{result.found['metric']} ({result.name}): {warning}"


def _unreadable(story: Story) -> Iterator[str]:
    if line := unreadable_line(len(story.bad_files)):
        yield line
    for result in results_of(story.results):
        if num := result.found.get("unreadable"):
            yield (
                f"{result.found['metric']} ({result.name}) excludes {count(num, 'image')} that "
                "could not be read."
            )
