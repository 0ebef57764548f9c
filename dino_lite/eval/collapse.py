"""Detection of collapse: statistics of the teacher's distributions and of features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dino_lite.contracts import Scores, Targets

# Measured on the embedded set, 300 steps, after a tenth of the run. teacher_information, healthy:
# 0.03 or more (512 and 4,096 prototypes, two seeds), 0.38 with batch norm in the head, 0.017 under
# compat=dino, 0.0046 at temperature 0.07; in tests' tiny runs 0.0056 or more. Collapsed: below 1e-3
# by a sixth of the run, often below 1e-5 (rate x 10 and x 100; temperature 0.2 and 1; momentum 0.9;
# no centering); an aliased teacher's comes back now and then. prototype_perplexity
# without centering: 2.0 and falling; healthy: 15 and more.
# embedding_std without prototypes, healthy: 0.50 or more (1,500 steps), in tests' tiny runs 0.14;
# of alignment alone, tiny: below 0.07 from two thirds of the run on, 0.014 at three times the rate.
_INFORMATION = 0.002  # nats
_PERPLEXITY = 2.5  # prototypes
_SPREAD = 0.07  # of embeddings, where there are no prototypes
_HIGHEST_TEMP = 0.07  # the paper's (Caron et al. 2021, section 3.2)

WINDOW = 10  # samples over which prototypes are counted; also the minimum length of a collapse
EARLIEST = 0.1  # fraction of the run before which nearly constant features are not a failure
LASTING = 0.05  # fraction of the run that a collapse must last

_LOGITS_BYTES = 64 * 2**20  # of logits held at once


def could_alarm(steps: Shaped[np.ndarray, "n"], num_steps: int | None = None) -> bool:
    """Whether samples at `steps` of a run (up to the last of them if `num_steps` is None) were late
    and many enough for a collapse to be reported.
    """
    total = num_steps or (steps[-1] if len(steps) else 0)
    late = steps[steps >= EARLIEST * total]
    return len(late) >= WINDOW and bool(late[-1] - late[0] >= LASTING * total)


class Look(NamedTuple):
    """Sums over the images of a micro-batch, on the device. Sums of micro-batches add up."""

    num_images: int
    num_crops: int  # of the teacher
    probs: Float[Tensor, "K"]  # the teacher's distributions
    chosen: Int[Tensor, "K"]  # number of crops whose most probable prototype it is
    entropy: Float[Tensor, ""]
    agreement: Float[Tensor, ""]  # sum over images of the fraction of pairs that choose the same
    z: Float[Tensor, "E"]  # the teacher's
    squares: Float[Tensor, "E"]  # of z
    center: Float[Tensor, ""]  # sum over images of the norm of the centering of logits
    temp: float  # the teacher's

    def plus(self, other: Look) -> Look:
        """The sum of both."""
        parts: Any = zip(self, other, strict=True)
        return Look(*(a + b for a, b in parts))._replace(temp=self.temp)


@torch.no_grad()
def look(scores: Scores, targets: Targets, most: int) -> Look:
    """Statistics of teacher and student for at most `most` images, in at least float32; without
    prototypes only of z.

    The student's first T crops are the teacher's; each is compared with those it learns from.
    """
    num_teacher, num_images = len(targets.z), min(most, targets.z.shape[1])
    wide = torch.promote_types(targets.z.dtype, torch.float32)
    with torch.autocast(targets.z.device.type, enabled=False):
        theirs, ours = (p.prototypes.rows().to(wide) for p in (targets, scores))
        probs, chosen = theirs.new_zeros(len(theirs)), torch.zeros_like(theirs[:, 0]).long()
        entropy, agreement = theirs.new_zeros(()), theirs.new_zeros(())
        pairs = (targets.pairs[:, :num_teacher] > 0).to(theirs)
        step = max(1, _LOGITS_BYTES // max(1, theirs[:, 0].nbytes * num_teacher))
        for start in range(0, num_images if len(theirs) else 0, step):
            cut = slice(start, min(start + step, num_images))
            logits = targets.z[:, cut].to(wide) @ theirs.T / targets.temp
            logits += targets.row[:, cut, None].to(wide) + targets.col.to(wide)
            largest = logits.argmax(-1)  # T n
            chosen.scatter_add_(0, largest.flatten(), torch.ones_like(largest).flatten())
            q = logits.exp()
            probs += q.sum((0, 1))
            entropy -= (q * logits).sum()
            guess = (scores.z[:num_teacher, cut].to(wide) @ ours.T).argmax(-1)  # T n
            same = (largest[:, None] == guess[None]).to(wide).sum(-1)  # T T
            agreement += (pairs * same).sum() / pairs.sum()
        z = targets.z[:, :num_images].to(wide).flatten(0, 1)
        center = num_images * targets.temp * torch.linalg.vector_norm(targets.col.to(wide))
    return Look(
        num_images,
        num_images * num_teacher,
        probs,
        chosen,
        entropy,
        agreement,
        z.sum(0),
        z.square().sum(0),
        center,
        targets.temp,
    )


def health(looks: Sequence[Look]) -> dict[str, float]:
    """Scalars of the last look; where prototypes are counted, of all of them.

    Entropies in nats. `teacher_information`: mutual information of crop and prototype, entropy of
    the mean minus mean of the entropies; 0 in every kind of collapse. `prototype_perplexity`: the
    effective number of prototypes, exp of the entropy of the mean distribution, at most K.
    `embedding_std`: as `relative_std`, of the teacher's bottleneck vectors; the only value without
    prototypes.
    """
    last, crops = looks[-1], sum(seen.num_crops for seen in looks)
    variance = last.squares / last.num_crops - (last.z / last.num_crops).square()
    embedding_std = variance.clamp(min=0).sqrt().mean() * len(variance) ** 0.5
    if not len(last.probs):
        return {"embedding_std": float(embedding_std)}
    mean = torch.stack([seen.probs for seen in looks]).sum(0) / crops
    spread = _entropy(mean)
    used = torch.stack([seen.chosen for seen in looks]).sum(0).count_nonzero()
    information = _entropy(last.probs / last.num_crops) - last.entropy / last.num_crops
    values = {
        "teacher_entropy": last.entropy / last.num_crops,
        "teacher_information": information.clamp(min=0),
        "kl_to_uniform": math.log(len(mean)) - spread,
        "prototypes_used": used,
        "prototype_perplexity": spread.exp(),
        "center_norm": last.center / last.num_images,
        "embedding_std": embedding_std,
        "agreement": last.agreement / last.num_images,
    }
    numbers = torch.stack(
        [value.double() for value in values.values()]
    ).tolist()  # a single synchronization
    return dict(zip(values, numbers, strict=True))


SKIPPED = "skipped"  # kind of the one warning that tells of no collapse


class Alarm(NamedTuple):
    """The kind of a problem in a word, and a sentence that names the setting to change."""

    kind: str
    text: str


def collapse(values: dict[str, float], num_prototypes: int, temp: float) -> Alarm | None:
    """The collapse that `values` of `health` show, if any; `temp` is the teacher's.

    Two values detect it, the others suggest the cause. Without prototypes it is detected by the
    spread of embeddings.
    """
    if not num_prototypes:
        return _constant(values) if values["embedding_std"] < _SPREAD else None
    if values["prototype_perplexity"] < _PERPLEXITY:
        return Alarm(
            "one_prototype",
            f"collapse: of {num_prototypes:,} prototypes the teacher gives one to nearly all crops "
            f"(effective number {values['prototype_perplexity']:.2f}), which centering should "
            "prevent; lower method.center_momentum (0.9 in the paper) or raise "
            "method.teacher_temp.",
        )
    if not values["teacher_information"] < _INFORMATION:
        return None
    if temp > _HIGHEST_TEMP:
        return Alarm(
            "uniform_teacher",
            "collapse: the teacher's distributions are nearly uniform and the same for every crop, "
            f"so the loss stays near ln {num_prototypes:,} = {math.log(num_prototypes):.2f}; lower "
            f"method.teacher_temp from {temp:g} (0.04 to 0.07 in the paper).",
        )
    return _constant(values)


def _constant(values: dict[str, float]) -> Alarm:
    return Alarm(
        "constant_features",
        "collapse: the network maps every image to the same embedding (spread "
        f"{values['embedding_std']:.4f} of 1); start again with a lower optim.rate or a longer "
        "optim.learning_rate.warmup, and with method.momentum of 0.99 or more.",
    )


def relative_std(features: Float[Tensor, "N D"]) -> float:
    """Standard deviation of unit rows over the data, mean of the columns, times √D: about 1 for
    uniform directions, 0 if all rows are equal (Chen and He 2021, section 4.1).
    """
    rows = torch.nn.functional.normalize(features.double(), dim=1)
    root: float = features.shape[1] ** 0.5
    return float(rows.std(0, correction=0).mean()) * root


def rankme(features: Float[Tensor, "N D"]) -> float:
    """Effective rank: exp of the entropy of the normalized singular values (Garrido et al. 2023,
    eq. 1), between 1 and min(N, D).
    """
    wide = features.double()
    gram = wide.T @ wide if len(wide) >= wide.shape[1] else wide @ wide.T
    values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(_entropy(share).exp())


def _entropy(probs: Float[Tensor, "K"]) -> Float[Tensor, ""]:
    total: Tensor = torch.special.xlogy(probs, probs).sum()
    return -total
