"""One optimizer step: targets, micro-batches, clipping, freezing, update, teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dino_lite.contracts import (
    Crops,
    Loss,
    Match,
    MatchError,
    Progress,
    Schedule,
    StepOutputs,
    StepTargets,
    UserError,
)
from dino_lite.distributed import rank
from dino_lite.methods.method import Method
from dino_lite.nn.buffers import KeptBuffers
from dino_lite.optim.param_groups import ClipBy, clip_gradients_, clip_groups, is_last_layer
from dino_lite.optim.schedules import Span, span_steps

Watch = Callable[[StepOutputs], None]  # an observer of a micro-batch's outputs


class Step:
    """Calling it with a batch of crops performs exactly one optimizer step.

    Schedules are evaluated at the step's own `Progress`. Teachers process the whole batch once; the
    student processes micro-batches of `micro_batch_size` images (0: the whole batch), whose
    gradients add up to the whole batch's. During `freeze_last_layer` the prototypes do not change:
    parameter groups marked `last_layer` have a learning rate of 0 but accumulate optimizer moments
    (DINOv2), last layers in other groups get no gradient (DINO). If a gradient is not finite, the
    step changes nothing but the step count; `max_skipped` consecutive skipped steps end the run.
    `rate_doubt` says that the learning rate is unusually high, and is then advised about first.
    `backward` and `no_sync` come from the strategy that synchronizes ranks.
    """

    def __init__(
        self,
        method: Method,
        losses: Mapping[str, Loss],
        optimizer: torch.optim.Optimizer,
        *,
        learning_rate: Schedule,
        weight_decay: Schedule,
        clip: float = 3.0,
        clip_by: ClipBy = "global",
        freeze_last_layer: Span = 0.0,
        micro_batch_size: int = 0,
        autocast: torch.dtype | None = None,
        seed: int = 0,
        max_skipped: int = 20,
        rate_doubt: str | None = None,
        backward: Callable[[Tensor], None] = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        for name, loss in losses.items():
            if loss.reads not in method.provides:
                raise UserError(
                    f"loss.{name} reads {loss.reads!r}, but {type(method).__name__} provides "
                    f"{', '.join(method.provides)}."
                )
        self.method, self.losses, self.optimizer = method, dict(losses), optimizer
        of_tokens = [loss for loss in losses.values() if loss.reads == "tokens"]
        method.needs_patches = not all(isinstance(x, Loss) and x.cls_only for x in of_tokens)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.clip, self.freeze_last_layer = clip, freeze_last_layer
        self.micro_batch_size, self.autocast, self.seed = micro_batch_size, autocast, seed
        self.max_skipped, self.backward, self.no_sync = max_skipped, backward, no_sync
        self.rate_doubt = rate_doubt
        # Steps without a finite gradient, on the device: consecutive ones, and all of them.
        self.skipped: Tensor | None = None
        self.skipped_total: Tensor | int = 0
        self.num_steps = int(method.step)  # the host's copy of method.step
        self.clip_groups = clip_groups(method.student, clip_by)
        apart = {p for g in optimizer.param_groups if g.get("last_layer") for p in g["params"]}
        last = [p for n, p in method.student.named_parameters() if is_last_layer(n)]
        self.last_layer = [p for p in last if p not in apart]

    def __call__(self, crops: Crops, at: Progress, watch: Watch | None = None) -> dict[str, Tensor]:
        """Returns detached scalars: "loss", each loss by name, "grad_norm" and "skipped"; with
        several students also "STUDENT/loss" and each "STUDENT/NAME".

        `watch` is called with the losses' inputs of each micro-batch and must not modify them.
        """
        frozen = at.step < span_steps(self.freeze_last_layer, at)
        self._write_rates(at, frozen)
        # Drop path draws from the global generator. It is seeded by seed, step and rank, so that a
        # resumed run draws the same paths.
        torch.manual_seed(hash((self.seed, self.num_steps, rank())))
        stateful = [self.method, *(x for x in self.losses.values() if isinstance(x, nn.Module))]
        buffers = KeptBuffers(stateful)
        with self._autocast(crops):
            targets = self.method.targets(crops, at)
        self.optimizer.zero_grad(set_to_none=True)
        scalars = self._accumulate(crops, targets, at, watch)
        if frozen:
            for parameter in self.last_layer:
                parameter.grad = None  # AdamW then skips the parameter: no moments, no decay
        gradients = [[p.grad for p in g if p.grad is not None] for g in self.clip_groups]
        norm = clip_gradients_(gradients, self.clip)
        ok = torch.isfinite(norm)
        self._update(ok)
        buffers.restore_unless_(ok)
        self.method.after_step(at, ok)
        self.num_steps += 1
        self.skipped = self._count_skipped(ok)
        self.skipped_total = self.skipped_total + (~ok).long()
        return scalars | {"grad_norm": norm, "skipped": self.skipped.float()}

    def _write_rates(self, at: Progress, frozen: bool) -> None:
        rate, decay = self.learning_rate(at), self.weight_decay(at)
        for group in self.optimizer.param_groups:
            held = frozen and group.get("last_layer", False)
            group["lr"] = 0.0 if held else rate * group.get("rate_scale", 1.0)
            if group["decay"]:
                group["weight_decay"] = decay

    def _autocast(self, crops: Crops) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(crops.globals_.device.type, dtype=self.autocast)

    def _accumulate(
        self, crops: Crops, targets: StepTargets, at: Progress, watch: Watch | None
    ) -> dict[str, Tensor]:
        """Forward and backward pass of every micro-batch; the last one synchronizes gradients."""
        size = self.micro_batch_size or crops.num_images
        starts = range(0, crops.num_images, size)
        sums: dict[str, Tensor] = {}
        for start in starts:
            stop = min(start + size, crops.num_images)
            with nullcontext() if start == starts[-1] else self.no_sync():
                with self._autocast(crops):
                    part = {name: target.part(start, stop) for name, target in targets.items()}
                    outputs = self.method.compare(crops.part(start, stop), part)
                    if watch is not None:
                        watch(outputs)
                    terms, weights = self._terms(outputs)
                    if not terms:
                        raise UserError(
                            f"loss: none of {', '.join(self.losses)} is active at step "
                            f"{self.num_steps}; add one that is, such as loss.dino."
                        )
                    weighted = {n: weights[n](at) * term for n, term in terms.items()}
                    total = torch.stack([*weighted.values()]).sum()
                self.backward(total)
            for name, term in {"loss": total, **_of_students(weighted), **terms}.items():
                sums[name] = sums[name] + term.detach() if name in sums else term.detach()
        return sums

    def _terms(self, outputs: StepOutputs) -> tuple[dict[str, Tensor], dict[str, Schedule]]:
        """Each active loss and its weight, by "LOSS" or, with several students, "STUDENT/LOSS"."""
        terms, weights = {}, {}
        for name, loss in self.losses.items():
            for key, match in outputs.items():
                student, _, read = key.rpartition("/")
                if loss.reads == read:
                    term = f"{student}/{name}" if student else name
                    terms[term], weights[term] = _term(name, loss, match), loss.weight
        return terms, weights

    def _update(self, ok: Tensor) -> None:
        """Optimizer step, skipped if `ok` is false: fused optimizers read it on the device, others
        require a synchronization.
        """
        inner: Any = getattr(
            self.optimizer, "optimizer", self.optimizer
        )  # Lightning's wrapper counts steps
        if getattr(inner, "_step_supports_amp_scaling", False):
            inner.found_inf = (~ok).to(torch.float32)
        elif not ok:
            self.optimizer.zero_grad(set_to_none=True)  # nothing to update, but the step counts
        self.optimizer.step()

    def check(self) -> None:
        """Raise UserError after too many consecutive skipped steps. Synchronizes."""
        if self.skipped is not None and int(self.skipped) >= self.max_skipped:
            raise UserError(
                f"{int(self.skipped)} optimizer steps in a row had a gradient that is not "
                f"finite: the run has diverged; {self.remedy}, and start again from scratch or "
                "from best.ckpt."
            )

    @property
    def remedy(self) -> str:
        """What to change if the run diverges, the likeliest cause first."""
        changes = [self.rate_doubt or "lower optim.rate"]
        changes.append("lower optim.clip" if self.clip else "set optim.clip=3")
        if self.autocast is not None:
            changes.append("use trainer.precision=32")
        return f"{', '.join(changes[:-1])} or {changes[-1]}"

    def _count_skipped(self, ok: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.long, device=ok.device)
        return torch.where(ok, zero, (zero if self.skipped is None else self.skipped) + 1)


def _of_students(weighted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum of each student's weighted losses, "STUDENT/loss"."""
    sums: dict[str, Tensor] = {}
    for name, term in weighted.items():
        if student := name.rpartition("/")[0]:
            key = f"{student}/loss"
            sums[key] = sums[key] + term if key in sums else term
    return sums


def _term(name: str, loss: Loss, match: Match) -> Tensor:
    """The loss of a match. Raises UserError if it cannot compare such a match."""
    try:
        return loss(match)
    except MatchError as error:
        raise UserError(f"loss.{name}.reads={error}; choose another match.") from error
