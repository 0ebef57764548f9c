"""One optimizer step against Algorithm 1 written out; parts, freezing, skipping, drop path."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from dino_lite.backbones.convnet import ConvNet
from dino_lite.contracts import Crops, Loss, Match, Progress, UserError
from dino_lite.distributed import all_reduce_mean_
from dino_lite.losses.koleo import KoLeoLoss
from dino_lite.losses.prototype import PrototypeLoss
from dino_lite.methods.dino import DINO
from dino_lite.methods.step import Step
from dino_lite.nn.batch_norm import across_ranks
from dino_lite.nn.heads import DINOHead
from dino_lite.optim.lars import LARS
from dino_lite.optim.param_groups import param_groups
from dino_lite.optim.schedules import Constant, Cosine, Warmup
from ranks import on_ranks
from test_dino import make_step, random_crops, tiny_dino

START = Progress(0, 10, 5)


def snapshot(method: DINO) -> dict[str, Tensor]:
    """Every tensor of the method, copied; the count of steps left out."""
    return {n: v.clone() for n, v in method.state_dict().items() if n != "step"}


def changed(method: DINO, before: dict[str, Tensor]) -> set[str]:
    """Names of what is no longer bit for bit as it was."""
    return {
        name for name, value in snapshot(method).items() if not torch.equal(value, before[name])
    }


def moments(step: Step) -> list[dict[str, Any]]:
    """The optimizer's state, copied, one a parameter in the optimizer's order."""
    return copy.deepcopy(list(step.optimizer.state.values()))


def assert_equal_states(a: DINO, b: DINO, **tolerance: float) -> None:
    """Student, teacher and center agree."""
    ours, theirs = a.state_dict(), b.state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("learn_norm", [False, True])
def test_four_steps_are_algorithm_1(fused: bool, learn_norm: bool) -> None:
    """Losses, student, teacher and center, in float64; every rate moves and clipping bites."""
    method = tiny_dino(learn_norm=learn_norm).double()
    student, teacher = copy.deepcopy(method.student), copy.deepcopy(method.student)
    groups = param_groups(method.student)
    decayed = {name for group in groups if group["decay"] for name in group["names"]}
    rate, decay = Cosine(1e-2, 1e-4, warmup=0.3), Cosine(0.04, 0.4)
    step = make_step(
        method,
        fused,
        learning_rate=rate,
        weight_decay=decay,
        clip=0.05,
        clip_by="parameter",
        freeze_last_layer="2 steps",
    )
    center, states = torch.zeros(24, dtype=torch.float64), {}
    for i in range(4):
        at = Progress(i, 5, 5)
        crops = random_crops(3, 2, dtype=torch.float64)
        assert crops.locals_ is not None
        loss, center = oracle.dino_step(
            student,
            teacher,
            center,
            states,
            [*crops.globals_, *crops.locals_],
            num_global=2,
            rate=rate(at),
            decay=decay(at),
            decayed=decayed,
            clip=0.05,
            frozen=i < 2,
            momentum=Cosine(0.9, 1.0)(at),
            student_temp=0.1,
            teacher_temp=Warmup(0.04, 0.07, 0.5)(at),
            center_momentum=0.9,
        )
        found = step(crops, at)
        torch.testing.assert_close(found["loss"], loss, rtol=1e-10, atol=0.0)
        torch.testing.assert_close(method.centering.center, center, rtol=1e-9, atol=1e-12)
    for network, wanted in ((method.student, student), (method.ema.module, teacher)):
        values = wanted.state_dict()
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, values[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 100])
def test_micro_batches_change_nothing(micro_batch_size: int) -> None:
    """1×4, 1×2 and a last part that is smaller equal 1×1: losses, weights, center, teacher."""
    whole = tiny_dino().double()
    parts = copy.deepcopy(whole)
    one, many = make_step(whole), make_step(parts, micro_batch_size=micro_batch_size)
    for i in range(3):
        crops, at = random_crops(4, 2, dtype=torch.float64), Progress(i, 5, 5)
        a, b = one(crops, at), many(crops, at)
        assert a.keys() == b.keys()
        for name in ("loss", "dino", "grad_norm"):
            torch.testing.assert_close(b[name], a[name], rtol=1e-9, atol=0.0)
    assert_equal_states(whole, parts, rtol=1e-8, atol=1e-9)


def test_gradients_are_exchanged_once_a_step() -> None:
    """All micro-batches but the last are inside no_sync."""
    entered: list[str] = []

    class NoSync(nullcontext[None]):
        def __enter__(self) -> None:
            entered.append("hold")

    def backward(total: Tensor) -> None:
        entered.append("backward")
        total.backward()

    step = make_step(tiny_dino(), micro_batch_size=2, backward=backward, no_sync=NoSync)
    step(random_crops(5), START)
    assert entered == ["hold", "backward", "hold", "backward", "backward"]


def test_losses_are_weighted_and_told_apart() -> None:
    """Two terms: "loss" and the gradient are of their weighted sum, each is told as itself."""
    method = tiny_dino().double()
    twin, crops = copy.deepcopy(method), random_crops(dtype=torch.float64)
    groups = param_groups(method.student)
    losses = {
        "sharp": PrototypeLoss("cls", Constant(0.5)),
        "soft": PrototypeLoss("cls", Constant(2.0), student_temp=0.5),
    }
    rates = {"learning_rate": Constant(1e-3), "weight_decay": Constant(0.0)}
    scalars = Step(method, losses, torch.optim.SGD(groups, lr=1.0), **rates)(crops, START)
    assert set(scalars) == {"loss", "sharp", "soft", "grad_norm", "skipped"}
    total = 0.5 * scalars["sharp"] + 2.0 * scalars["soft"]
    torch.testing.assert_close(scalars["loss"], total)
    match = twin.compare(crops, twin.targets(crops, START))["cls"]
    (0.5 * losses["sharp"](match) + 2.0 * losses["soft"](match)).backward()
    norm = torch.cat(
        [p.grad.flatten() for p in twin.student.parameters() if p.grad is not None]
    ).norm()
    torch.testing.assert_close(scalars["grad_norm"], norm)


def test_rates_are_written_to_their_groups() -> None:
    """The rate to all groups; the decay to the decayed group only."""
    method = tiny_dino()
    step = make_step(method, learning_rate=Constant(0.5), weight_decay=Constant(0.25))
    step(random_crops(), START)
    rates = [(g["decay"], g["lr"], g["weight_decay"]) for g in step.optimizer.param_groups]
    assert rates == [(True, 0.5, 0.25), (False, 0.5, 0.0)]


def test_layers_learn_at_rates_of_their_own() -> None:
    """A group's factor is in its rate, and in the update: a first Adam step moves by the rate."""
    method = tiny_dino().double()
    before = snapshot(method)
    groups = param_groups(method.student, layer_decay=0.5, patch_embed_scale=0.2)
    optimizer = torch.optim.AdamW(groups, eps=1e-30)
    losses = {"dino": PrototypeLoss("cls", Constant(1.0))}
    rates = {"learning_rate": Constant(1e-3), "weight_decay": Constant(0.0)}
    Step(method, losses, optimizer, **rates)(random_crops(dtype=torch.float64), START)
    assert {round(g["lr"] / 1e-3, 9) for g in groups} == {0.025, 0.125, 0.25, 0.5, 1.0}
    moved = {
        name: float((value - before[name]).abs().max()) / 1e-3
        for name, value in snapshot(method).items()
    }
    for name, scale in {
        "backbone.patch_embed.proj.weight": 0.025,
        "backbone.cls_token": 0.125,
        "backbone.blocks.0.mlp.fc1.weight": 0.25,
        "backbone.blocks.1.mlp.fc1.weight": 0.5,
        "backbone.norm.bias": 1.0,
        "head.mlp.0.weight": 1.0,
    }.items():
        assert moved[f"student.{name}"] == pytest.approx(scale, rel=1e-6), name


def test_each_module_has_a_norm_of_its_own_where_clipping_is_by_module() -> None:
    """What the optimizer gets is what a loop over the student's children makes of the gradients."""
    method = tiny_dino().double()
    method.student.head.requires_grad_()  # so that nothing is left out
    twin, crops = copy.deepcopy(method), random_crops(dtype=torch.float64)
    match = twin.compare(crops, twin.targets(crops, START))["cls"]
    PrototypeLoss("cls", Constant(1.0))(match).backward()
    limit, wanted = 0.05, {}
    for child, module in twin.student.named_children():
        named = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        assert math.sqrt(sum(float((g * g).sum()) for g in named.values())) > limit
        for name, gradient in zip(
            named, oracle.clip_global(list(named.values()), limit), strict=True
        ):
            wanted[f"{child}.{name}"] = gradient
    step = make_step(method, clip=limit, clip_by="module")
    scalars = step(crops, START)
    for name, parameter in method.student.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-8, atol=1e-12)
    whole = torch.cat([p.grad.flatten() for p in twin.student.parameters() if p.grad is not None])
    torch.testing.assert_close(scalars["grad_norm"], whole.norm())


def test_a_loss_that_reads_what_is_not_made_is_refused() -> None:
    """In a sentence that names the loss, what it reads, and what there is."""
    method = tiny_dino()
    optimizer = torch.optim.SGD(param_groups(method.student), lr=1.0)
    rates = {"learning_rate": Constant(1.0), "weight_decay": Constant(0.0)}
    with pytest.raises(
        UserError, match=r"loss\.ibot reads 'patch', but DINO provides embedding, tokens, cls\."
    ):
        Step(method, {"ibot": PrototypeLoss("patch", Constant(1.0))}, optimizer, **rates)


@pytest.mark.parametrize(
    "loss", [KoLeoLoss("cls", Constant(1.0)), PrototypeLoss("tokens", Constant(1.0))]
)
def test_a_loss_that_cannot_compare_its_match_is_refused_by_key(loss: Loss) -> None:
    """In the first step, which shows the types of the method's matches."""
    method = tiny_dino()
    optimizer = torch.optim.SGD(param_groups(method.student), lr=1.0)
    rates = {"learning_rate": Constant(1.0), "weight_decay": Constant(0.0)}
    step = Step(method, {"own": loss}, optimizer, **rates)
    with pytest.raises(UserError, match=rf"^loss\.own\.reads={loss.reads}: .* choose another"):
        step(random_crops(), START)


# -------------------------------------------------------------------------- the frozen last layer


@pytest.mark.parametrize("fused", [True, False])
def test_prototypes_stand_still_until_their_span_is_over(fused: bool) -> None:
    """No gradient, no moments, no decay for two steps; the third is their first Adam step."""
    method = tiny_dino(learn_norm=True)
    step = make_step(
        method,
        fused,
        freeze_last_layer="2 steps",
        learning_rate=Constant(1e-2),
        weight_decay=Constant(0.3),
    )
    last = method.student.head.last_layer
    start = (last.weight_v.detach().clone(), last.weight_g.detach().clone())
    for i in range(2):
        before = snapshot(method)
        step(random_crops(), Progress(i, 10, 5))
        assert torch.equal(last.weight_v, start[0])
        assert torch.equal(last.weight_g, start[1])
        assert last.weight_v.grad is None
        assert last.weight_g.grad is None
        assert not {last.weight_v, last.weight_g} & step.optimizer.state.keys()
        assert "student.head.mlp.0.weight" in changed(method, before)
    step(random_crops(), Progress(2, 10, 5))
    for parameter, before_ in zip((last.weight_v, last.weight_g), start, strict=True):
        assert not torch.equal(parameter, before_)
        assert float(step.optimizer.state[parameter]["step"]) == 1.0


@pytest.mark.parametrize("fused", [True, False])
def test_prototypes_frozen_by_rate_stand_still_and_gather_moments(fused: bool) -> None:
    """As in DINOv2: their gradients are there and are remembered, their weights stay bit for bit;
    the first step after that is Adam's third.
    """
    method = tiny_dino(learn_norm=True)
    groups = param_groups(method.student, freeze_by="rate")
    step = Step(
        method,
        {"dino": PrototypeLoss("cls", Constant(1.0))},
        torch.optim.AdamW(groups, fused=fused),
        freeze_last_layer="2 steps",
        learning_rate=Constant(1e-2),
        weight_decay=Constant(0.3),
    )
    last = method.student.head.last_layer
    names = {"student.head.last_layer.weight_v", "student.head.last_layer.weight_g"}
    for i in range(3):
        before = snapshot(method)
        step(random_crops(), Progress(i, 10, 5))
        assert (changed(method, before) & names) == (names if i == 2 else set())
        assert "student.head.mlp.0.weight" in changed(method, before)
        for parameter in (last.weight_v, last.weight_g):
            state = step.optimizer.state[parameter]
            assert parameter.grad is not None
            assert float(state["step"]) == i + 1
            assert bool(state["exp_avg"].any())
        rates = {group["last_layer"]: group["lr"] for group in step.optimizer.param_groups}
        assert rates == {False: 1e-2, True: 1e-2 if i == 2 else 0.0}


def test_freezing_holds_the_student_only() -> None:
    """A teacher whose prototypes differ still follows the student's, frozen as those are."""
    method = tiny_dino()
    theirs = method.ema.module.head.last_layer.weight_v
    theirs.add_(torch.randn_like(theirs))
    ours = method.student.head.last_layer.weight_v.detach().clone()
    wanted = oracle.ema(theirs, ours, 0.9)
    make_step(method, freeze_last_layer=0.5)(random_crops(), START)
    torch.testing.assert_close(theirs, wanted)


def test_without_a_span_the_prototypes_learn_at_once() -> None:
    """freeze_last_layer=0 freezes nothing."""
    method = tiny_dino()
    before = snapshot(method)
    make_step(method, learning_rate=Constant(1e-2))(random_crops(), START)
    assert "student.head.last_layer.weight_v" in changed(method, before)


# ------------------------------------------------------------------------------------ bad gradients


def sgd(method: DINO) -> torch.optim.Optimizer:
    """An optimizer with a memory, and no fused form."""
    return torch.optim.SGD(param_groups(method.student), lr=1.0, momentum=0.9)


def adamw(fused: bool) -> Callable[[DINO], torch.optim.Optimizer]:
    """AdamW over the method's groups."""
    return lambda m: torch.optim.AdamW(param_groups(m.student), fused=fused)


def lars(method: DINO) -> torch.optim.Optimizer:
    """Ours, which is told of a bad gradient on the device."""
    return LARS(param_groups(method.student), lr=1.0)


OPTIMIZERS = {"fused": adamw(True), "not fused": adamw(False), "sgd": sgd, "lars": lars}


def poisoned(crops: Crops) -> Crops:
    """The batch with one pixel that is infinite."""
    images = crops.globals_.clone()
    images[0, 0, 0, 0, 0] = math.inf
    return crops._replace(globals_=images)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip_by", ["global", "module", "parameter"])
@pytest.mark.parametrize("where", ["batch", "gradient"])
def test_a_bad_gradient_is_as_if_the_step_had_not_been(
    optimizer: str, clip_by: str, where: str
) -> None:
    """Weights, teacher, center and moments stay bit for bit; the next step is a clean twin's."""
    method = tiny_dino()
    twin = copy.deepcopy(method)
    losses = {"dino": PrototypeLoss("cls", Constant(1.0))}
    settings = {"learning_rate": Constant(1e-3), "weight_decay": Constant(0.1), "clip_by": clip_by}
    step, clean = (Step(m, losses, OPTIMIZERS[optimizer](m), **settings) for m in (method, twin))
    batches = [random_crops() for _ in range(3)]
    for run in (step, clean):
        run(batches[0], START)
    before, memory = snapshot(method), moments(step)

    bad = poisoned(batches[1]) if where == "batch" else batches[1]
    if where == "gradient":
        weight = method.student.backbone.blocks[0].mlp.fc1.weight
        hook = weight.register_hook(lambda gradient: gradient * math.nan)
    scalars = step(bad, START)
    if where == "gradient":
        hook.remove()
    assert not torch.isfinite(scalars["grad_norm"])
    assert int(scalars["skipped"]) == 1
    assert changed(method, before) == set()
    for now, then in zip(moments(step), memory, strict=True):
        assert all(torch.equal(torch.as_tensor(now[k]), torch.as_tensor(then[k])) for k in then)
    assert int(method.step) == step.num_steps == 2

    assert int(step(batches[2], START)["skipped"]) == 0
    clean(batches[2], START)
    twin.step += 1
    assert_equal_states(method, twin, rtol=0.0, atol=0.0)


class Queue(torch.nn.Module, Loss):
    """A loss with a queue of what it has seen, as another package may bring one."""

    reads, weight = "cls", Constant(1.0)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.loss = PrototypeLoss("cls", Constant(1.0))

    def forward(self, match: Match) -> Tensor:
        """A new tensor each time, as `torch.cat` gives one."""
        value: Tensor = self.loss(match)
        self.seen = torch.cat([self.seen[1:], value.detach()[None]])
        return value


def batch_normalized(rank: int | None = None) -> DINO:
    """A DINO of a small convnet with batch normalization."""
    torch.manual_seed(1)
    backbone = ConvNet(widths=[8, 16], depths=[1, 1], patch_size=4, norm="batch")
    head = partial(DINOHead, num_prototypes=12, hidden_dim=16, bottleneck_dim=8, batch_norm=True)
    method = DINO(backbone, head, Constant(0.9), Constant(0.04))
    if rank is not None:
        across_ranks(method)
    return method


def poisoned_steps(rank: int | None = None) -> tuple[list[str], Tensor]:
    """After a good step, one with an infinite pixel (on rank 1 only, if there are several) and
    micro-batches: what has changed, and the loss of a good step that follows.
    """
    method, queue = batch_normalized(rank), Queue()
    losses = {"dino": PrototypeLoss("cls", Constant(1.0)), "queue": queue}
    rates = {"learning_rate": Constant(1e-3), "weight_decay": Constant(0.1)}
    step = Step(method, losses, OPTIMIZERS["fused"](method), micro_batch_size=2, **rates)
    if rank is not None:
        step.backward = averaged(method)
    torch.manual_seed(2 + (rank or 0))
    step(random_crops(), START)
    kept = {n: b.clone() for n, b in method.named_buffers() if n != "step"}
    before, seen = snapshot(method) | kept, queue.seen.clone()
    assert torch.isfinite(step(random_crops(), START)["grad_norm"])
    assert "teachers.ema.module.backbone" in "".join(changed(method, before))
    before, seen = snapshot(method), queue.seen.clone()
    bad = random_crops() if rank == 0 else poisoned(random_crops())
    assert int(step(bad, START)["skipped"]) == 1
    left = [*changed(method, before)] + ([] if torch.equal(queue.seen, seen) else ["queue"])
    return left, step(random_crops(), START)["loss"]


def averaged(method: DINO) -> Callable[[Tensor], None]:
    """A backward pass that averages gradients over ranks, as DDP does."""

    def backward(loss: Tensor) -> None:
        loss.backward()
        for parameter in method.student.parameters():
            if parameter.grad is not None:
                all_reduce_mean_(parameter.grad)

    return backward


def test_a_bad_batch_leaves_running_statistics_and_queues() -> None:
    """Of batch normalization in student and teacher, and of losses; later steps are finite."""
    left, loss = poisoned_steps()
    assert left == []
    assert torch.isfinite(loss)


def test_a_bad_batch_of_one_process_is_skipped_by_all() -> None:
    """Statistics over both would be NaN in both."""
    for left, loss in on_ranks(2, poisoned_steps):
        assert left == []
        assert torch.isfinite(loss)


def test_all_skipped_steps_are_counted() -> None:
    """Those in a row apart."""
    step = make_step(tiny_dino())
    for batch in (poisoned(random_crops()), random_crops(), poisoned(random_crops())):
        scalars = step(batch, START)
    assert int(step.skipped_total) == 2
    assert int(scalars["skipped"]) == 1


def test_the_first_step_may_be_bad() -> None:
    """Moments that do not exist yet start from nothing afterwards."""
    method = tiny_dino()
    before = snapshot(method)
    step = make_step(method)
    step(poisoned(random_crops()), START)
    assert changed(method, before) == set()
    assert all(float(state["step"]) == 0.0 for state in step.optimizer.state.values())
    step(random_crops(), Progress(1, 10, 5))
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())


@pytest.mark.parametrize("fused", [True, False])
def test_a_wrapped_optimizer_is_stepped_through_its_wrapper(fused: bool) -> None:
    """Lightning counts its wrapper's steps; a bad one is told to the optimizer inside."""

    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups
            self.zero_grad, self.num_steps = optimizer.zero_grad, 0

        def step(self) -> None:
            self.num_steps += 1
            self.optimizer.step()

    method = tiny_dino()
    step = make_step(method, fused)
    step.optimizer = wrapper = Wrapper(step.optimizer)  # type: ignore[assignment]
    step(random_crops(), Progress(1, 10, 5))
    assert wrapper.num_steps == 1
    before = snapshot(method)
    step(poisoned(random_crops()), Progress(1, 10, 5))
    assert changed(method, before) == set()
    assert wrapper.num_steps == 2  # Lightning's count and the method's stay equal


def test_too_many_bad_steps_in_a_row_end_the_run() -> None:
    """Two are survived, a good one starts the count anew, three are a diagnosis."""
    method = tiny_dino()
    step = make_step(method, max_skipped=3)
    step.check()
    good, bad = random_crops(), poisoned(random_crops())
    for batch, count in ((bad, 1), (bad, 2), (good, 0), (bad, 1), (bad, 2)):
        assert int(step(batch, START)["skipped"]) == count
        step.check()
    step(bad, START)
    with pytest.raises(UserError, match=r"^3 optimizer steps in a row .*optim\.rate"):
        step.check()
    assert step.remedy == "lower optim.rate or lower optim.clip"
    step = make_step(method, clip=0.0, rate_doubt="lower optim.rate (10 is much)")
    assert step.remedy == "lower optim.rate (10 is much) or set optim.clip=3"


# ------------------------------------------------------------------------------------ drop path


def loss_of(method: DINO, at: int, seed: int = 0, noise: int = 0) -> float:
    """Loss of step `at` on a fixed batch, after somebody else drew `noise` numbers."""
    torch.manual_seed(3)
    crops = random_crops()
    torch.manual_seed(noise)
    method = copy.deepcopy(method)
    method.step.fill_(at)
    return float(make_step(method, seed=seed)(crops, Progress(at, 10, 5))["loss"])


def test_dropped_paths_are_keyed_by_seed_and_step() -> None:
    """Not by what was drawn before; another seed or step drops other paths."""
    method = tiny_dino(drop_path=0.5)
    assert loss_of(method, 1) == loss_of(method, 1, noise=99)
    assert loss_of(method, 1) != loss_of(method, 1, seed=1)
    assert loss_of(method, 7) != loss_of(method, 8)  # the temperature is level there
    still = tiny_dino()
    assert loss_of(still, 7) == loss_of(still, 8) == loss_of(still, 7, seed=1)


def test_a_step_made_anew_draws_the_same_paths() -> None:
    """A resumed run counts on from the method's own step: weights equal to the last bit."""
    batches = [random_crops() for _ in range(4)]
    through = tiny_dino(drop_path=0.5)
    resumed = copy.deepcopy(through)
    step = make_step(through)
    for i, crops in enumerate(batches):
        step(crops, Progress(i, 10, 5))
    first = make_step(resumed)
    for i in (0, 1):
        first(batches[i], Progress(i, 10, 5))
    second = make_step(resumed)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    torch.rand(5)
    for i in (2, 3):
        second(batches[i], Progress(i, 10, 5))
    assert_equal_states(through, resumed, rtol=0.0, atol=0.0)


def test_an_optimizers_state_of_two_bare_groups_is_taken_up() -> None:
    """Checkpoints of earlier versions know neither factors nor last layers: the run goes on bit for
    bit as it would have.
    """
    batches = [random_crops() for _ in range(3)]
    through = tiny_dino()
    resumed = copy.deepcopy(through)
    step, first = make_step(through), make_step(resumed)
    for i, crops in enumerate(batches):
        step(crops, Progress(i, 10, 5))
    first(batches[0], Progress(0, 10, 5))
    old = first.optimizer.state_dict()
    assert len(old["param_groups"]) == 2
    for group in old["param_groups"]:
        del group["rate_scale"], group["last_layer"]
    second = make_step(resumed)
    second.optimizer.load_state_dict(old)
    for i in (1, 2):
        second(batches[i], Progress(i, 10, 5))
    assert_equal_states(through, resumed, rtol=0.0, atol=0.0)


# ------------------------------------------------------------------------------------ precision


def test_a_step_under_bfloat16_autocast_is_near_the_float32_one() -> None:
    """Weights, moments, center and loss stay float32; the values are near."""
    exact = tiny_dino()
    half, crops = copy.deepcopy(exact), random_crops(2)
    rates = {"learning_rate": Constant(1e-3), "weight_decay": Constant(0.0)}
    wanted = make_step(exact, **rates)(crops, START)
    step = make_step(half, autocast=torch.bfloat16, micro_batch_size=1, **rates)
    found = step(crops, START)
    assert found["loss"].dtype == torch.float32
    torch.testing.assert_close(found["loss"], wanted["loss"], rtol=0.05, atol=0.05)
    assert {v.dtype for v in half.state_dict().values()} == {torch.float32, torch.int64}
    assert all(s["exp_avg"].dtype == torch.float32 for s in step.optimizer.state.values())
    assert_equal_states(half, exact, rtol=0.0, atol=2.1e-3)  # a first Adam step moves by the rate


def test_scalars_stay_on_the_device_as_tensors() -> None:
    """Nothing is read back in a step: the caller decides when to wait."""
    scalars = make_step(tiny_dino())(random_crops(), START)
    assert all(isinstance(value, Tensor) and value.ndim == 0 for value in scalars.values())
