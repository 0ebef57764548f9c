"""Adapters: identity at the start, loops, merging, what is trained, files and runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from dino_lite.backbones.blocks import set_memory
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.layers import is_bare
from dino_lite.contracts import Backbone, Progress, UserError
from dino_lite.methods.retention import Unadapted
from dino_lite.nn.lora import LoRA, LowRank, merged, merged_tensors, without_adapters
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone
from dino_lite.runs.pretraining import run_pretrain
from test_dino import random_crops
from test_retention import dinov2, frozen, loud_network, rope, step_of, vit
from tiny import checkpoint, exported, tiny, train

NETWORKS = {
    "vit": lambda: vit(),
    "dinov2": lambda: vit(mlp="swiglu", init_values=0.1, num_registers=2, mask_token=True),
    "timm": lambda: vit(name="vit_tiny_patch16_224", embed_dim=24, num_heads=3, depth=1),
    "rope": lambda: rope(),
    "unbiased keys": lambda: rope(qkv_bias=True),
}


def adapted(network: Backbone, **settings: Any) -> Backbone:
    """The network with adapters of rank 3, switched on by weights that are not zero."""
    LoRA(**{"rank": 3, "alpha": 6.0} | settings)(network)
    for part in network.modules():
        if isinstance(part, LowRank):
            torch.nn.init.normal_(part.lora_b, std=0.3)
    return network


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("cls_only", [False, True])
def test_an_adapter_changes_nothing_at_the_start(name: str, cls_only: bool) -> None:
    """Bit for bit, in training and in eval mode; stock names stay, and each block has two. Of a
    plain layer, the last block computes some rows of qkv only, which may round them differently.
    """
    network = loud_network(NETWORKS[name]())
    plain, images = copy.deepcopy(network), torch.randn(2, 3, 16, 16)
    LoRA(rank=3)(network)
    for mode in (True, False):
        mine, theirs = (net.train(mode)(images, cls_only=cls_only) for net in (network, plain))
        rounding = {"rtol": 1e-5, "atol": 1e-6} if cls_only else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(mine.cls, theirs.cls, **rounding)
        torch.testing.assert_close(mine.patches, theirs.patches, **rounding)
    added = network.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() <= network.state_dict().keys()
    assert len(added) == 3 * 2 * network.num_blocks


@pytest.mark.parametrize("memory", ["high", "normal", "low"])
def test_an_adapted_layer_is_the_loops(memory: Any) -> None:
    """Value and gradient through the network's fast paths, which read weights of plain layers."""
    network = adapted(loud_network(vit())).double().train()
    set_memory(network, memory, compiled=False)
    layer: Any = network.blocks[0].attn.qkv
    assert not is_bare(layer)
    x = torch.randn(5, 16, dtype=torch.float64)
    wanted = oracle.low_rank(x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, 6.0 / 3)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    network(images, cls_only=True).cls.square().sum().backward()
    slopes = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert set(slopes) == {n for n, _ in network.named_parameters() if "lora_" in n}
    twin = merged(network)
    weight = twin.blocks[-1].attn.qkv.weight.requires_grad_()
    twin(images, cls_only=True).cls.square().sum().backward()
    last: Any = network.blocks[-1].attn.qkv  # by the chain rule through W + s·B·A
    torch.testing.assert_close(last.lora_b.grad, 2.0 * weight.grad @ last.lora_a.T)
    torch.testing.assert_close(last.lora_a.grad, 2.0 * last.lora_b.T @ weight.grad)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_merged_network_is_the_adapted_one(name: str) -> None:
    """In float64, with the same class and names as before; the adapted one is left as it is."""
    plain = loud_network(NETWORKS[name]()).double()
    network = adapted(copy.deepcopy(plain)).eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    wanted = network(images)
    one = merged(network)
    assert one.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in one.modules()] == [type(m) for m in plain.modules()]
    found = one(images)
    torch.testing.assert_close(found.cls, wanted.cls, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found.patches, wanted.patches, rtol=1e-10, atol=1e-11)
    assert torch.equal(network(images).cls, wanted.cls)
    assert not torch.allclose(plain.eval()(images).cls, wanted.cls)
    from_file = merged_tensors({f"x.{n}": v for n, v in network.state_dict().items()})
    assert all(torch.equal(from_file[f"x.{n}"], v) for n, v in one.state_dict().items())
    assert len(from_file) == len(one.state_dict())
    assert merged(plain) is plain


def test_without_adapters_it_is_the_start() -> None:
    """However far they have moved; afterwards they are on again."""
    plain = loud_network(vit())
    network, images = adapted(copy.deepcopy(plain), dropout=0.5).eval(), torch.randn(2, 3, 16, 16)
    wanted = network(images).cls
    with without_adapters(network):
        assert torch.equal(network(images).cls, plain.eval()(images).cls)
    assert torch.equal(network(images).cls, wanted)


def test_what_has_no_such_projections_is_refused() -> None:
    """A convolutional network."""
    with pytest.raises(UserError, match="adapter=lora: ConvNet has no qkv"):
        LoRA()(ConvNet(patch_size=4, widths=[8], depths=[1]))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_only_adapters_and_heads_are_trained_in_student_and_average(dropout: float) -> None:
    """The start is the student without adapters: nothing of it moves, no second network is built,
    and retention is zero at first.
    """
    network = loud_network(vit(mask_token=True))
    LoRA(rank=2, dropout=dropout)(network)
    method: Any = dinov2(network).train()
    before = {n: v.clone() for n, v in method.state_dict().items()}
    step, crops = step_of(method), random_crops(4, 2)
    assert step.retention is not None
    step.retention.frozen = Unadapted(method.student.backbone)
    first = step(crops, Progress(0, 10, 5))
    assert float(first["kept"]) == float(first["kept_gram"]) == 0.0
    assert float(step(crops, Progress(1, 10, 5))["kept"]) > 0
    moved = {n for n, v in method.state_dict().items() if not torch.equal(v, before[n])}
    for role in ("student.", "teachers.ema.module."):
        of_backbone = {n for n in moved if n.startswith(f"{role}backbone.")}
        assert of_backbone
        assert all("lora_" in n for n in of_backbone)
    twins = (method.ema.module.backbone, method.student.backbone)
    assert method.export_backbone().state_dict().keys() < twins[0].state_dict().keys()
    with without_adapters(twins[1]):
        tokens = twins[1].eval()(crops.globals_[0])
    start = frozen(copy.deepcopy(network))  # only its own weights count
    with without_adapters(start.network.backbone):
        assert torch.equal(tokens.cls, start(crops.globals_[0]).cls)


# ------------------------------------------------------------------------------------------- runs

ADAPTER = "adapter={_target_: dino_lite.nn.lora.LoRA, rank: 2}"
ONE = "weight: {_target_: dino_lite.optim.schedules.Constant, value: 1.0}"
KEPT = f"loss.kept={{_target_: dino_lite.losses.kept.KeptLoss, reads: kept, {ONE}}}"
L2SP = f"loss.l2sp={{_target_: dino_lite.losses.l2sp.L2SP, {ONE}}}"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights are adapted."""
    return train(tmp_path_factory.mktemp("lora"), "name=old", "trainer.max_steps=3")


def stage(old: Path, name: str, *words: str) -> list[str]:
    """A stage that begins with that run, and holds on to it."""
    weights = f"{old}/checkpoints/last.ckpt"
    start = [f"backbone.pretrained={weights}", f"teacher={{checkpoint: {weights}, digest: null}}"]
    return [f"name={name}", *start, KEPT, "optim.rate=0.05", *words]


def parts(run: Path, network: str) -> tuple[Tensor, ...]:
    """Weight, A, B and scale of one layer."""
    state = checkpoint(run)["state_dict"]
    prefix = f"method.{network}.blocks.1.attn.qkv"
    names = ("weight", "lora_a", "lora_b", "lora_scale")
    return tuple(state[f"{prefix}.{name}"] for name in names if f"{prefix}.{name}" in state)


@pytest.mark.slow
def test_an_adapted_run_opens_merged_and_is_gone_on_from(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's file is not opened while training; checkpoint=, backbone.pretrained= and a
    second adaptation read W + s·B·A, and an export holds it.
    """
    runs = old.parent
    monkeypatch.setattr("dino_lite.methods.frozen.FrozenTeacher.network", None)  # never opened
    run = train(runs, *stage(old, "adapted", ADAPTER))
    monkeypatch.undo()
    opened = open_backbone(find_checkpoint(str(run), runs)).backbone
    assert not any("lora" in name for name in opened.state_dict())
    teacher, student = "teachers.ema.module.backbone", "student.backbone"
    weight, a, b, scale = parts(run, teacher)
    assert torch.equal(weight, parts(old, teacher)[0])
    whole: Any = opened.get_submodule("blocks.1.attn.qkv").weight
    torch.testing.assert_close(whole, weight + scale * b @ a)
    assert not torch.equal(whole, weight)
    folder = exported(opened, runs / "export")
    exports: Any = open_backbone(find_checkpoint(str(folder), runs)).backbone
    assert torch.equal(exports.blocks[1].attn.qkv.weight, whole)
    still = ["trainer.max_steps=1", "optim.freeze_backbone=1.0", "optim.freeze_last_layer=0.0"]
    begun = [f"backbone.pretrained={run}/checkpoints/last.ckpt", *still]
    again = train(runs, "name=again", *begun)
    torch.testing.assert_close(parts(again, student)[0], whole)
    second = train(runs, "name=second", f"checkpoint={run}", ADAPTER, *still)
    weight, a, b, scale = parts(run, student)
    torch.testing.assert_close(parts(second, student)[0], weight + scale * b @ a)


def test_an_adapter_needs_weights_and_excludes_penalties(old: Path, tmp_path: Path) -> None:
    """A random network would stay as it is; the weights of the backbone do not move."""
    with pytest.raises(UserError, match="adapter= keeps the network's own weights"):
        run_pretrain(tiny(tmp_path, ADAPTER))
    with pytest.raises(UserError, match=r"loss\.l2sp holds weights that an adapter"):
        run_pretrain(tiny(tmp_path, *stage(old, "both", ADAPTER, L2SP)))
