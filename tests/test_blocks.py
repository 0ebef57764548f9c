"""Our way through timm's blocks: the same numbers, whatever is kept, dropped or compiled."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from dino_lite.backbones.blocks import draw_drops, run_blocks, set_memory
from dino_lite.backbones.layers import attention
from dino_lite.backbones.spec import build_backbone
from dino_lite.backbones.transformer import timm_vit
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Memory, Progress
from ranks import apart


def make_vit(**changes: Any) -> ViT:
    """Three blocks in float64, all weights away from their first values."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2}
    vit = ViT(**(sizes | changes)).double()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vit


def timm_blocks(vit: ViT, tokens: Tensor) -> Tensor:
    """timm's own forward of timm's blocks, with the weights, modes and drop paths of ours."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2}
    named = ("init_values", "qkv_bias", "qk_norm", "mlp", "proj_bias")
    settings = {name: vit.spec[name] for name in named if name in vit.spec}
    with torch.random.fork_rng():
        model = timm_vit("vit", **sizes, **settings).train(vit.training)
    for ours, theirs in zip(vit.blocks, model.blocks, strict=True):
        theirs.drop_path1, theirs.drop_path2 = ours.drop_path1, ours.drop_path2
        tokens = functional_call(theirs, dict(ours.named_parameters()), (tokens,))
    return tokens


def slopes(vit: ViT, out: Tensor, tokens: Tensor) -> list[Tensor]:
    """Of the tokens and every weight of the blocks, for a fixed mixture of the output."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    inputs = [tokens, *(p for p in vit.blocks.parameters())]
    return list(torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize("memory", ["high", "normal", "low"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_values": 0.5},
        {"qkv_bias": False},
        {"qk_norm": True},
        {"mlp": "swiglu"},
        {"mlp": "swiglu", "proj_bias": False, "init_values": 0.5},
    ],
)
def test_values_and_slopes_are_timms(memory: Memory, changes: dict[str, Any]) -> None:
    """With layer scale, without biases, with normed queries, gated: whatever is kept in between."""
    vit, tokens = make_vit(**changes), torch.randn(2, 5, 12).double().requires_grad_()
    wanted, found = timm_blocks(vit, tokens), run_blocks(list(vit.blocks), tokens, None, memory)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    for a, b in zip(slopes(vit, found, tokens), slopes(vit, wanted, tokens), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@settings(max_examples=20)
@given(seed=st.integers(0, 100), num_tokens=st.integers(1, 6), num_queries=st.integers(1, 6))
def test_few_queries_are_the_first_tokens_of_all(
    seed: int, num_tokens: int, num_queries: int
) -> None:
    """Values, and slopes of what is asked for: the rest of the last block is left out."""
    torch.manual_seed(seed)
    vit, num_queries = make_vit(), min(num_queries, num_tokens)
    tokens = torch.randn(2, num_tokens, 12).double().requires_grad_()
    wanted = timm_blocks(vit, tokens)[:, :num_queries]
    found = run_blocks(list(vit.blocks), tokens, num_queries)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    for a, b in zip(slopes(vit, found, tokens), slopes(vit, wanted, tokens), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_class_features_alone_are_those_of_a_whole_pass() -> None:
    """cls_only: equal class features, no patches, the same grid."""
    vit, images = make_vit(), torch.randn(2, 3, 16, 24).double()
    whole, alone = vit(images), vit(images, cls_only=True)
    torch.testing.assert_close(alone.cls, whole.cls, rtol=1e-11, atol=1e-12)
    assert alone.patches.shape == (2, 0, 12)
    assert alone.grid == whole.grid == (2, 3)


@pytest.mark.parametrize("memory", ["high", "normal", "low"])
def test_stochastic_depth_draws_as_timm_does(memory: Memory) -> None:
    """The same seed drops the same halves of blocks, also where they are computed twice."""
    vit, tokens = make_vit(drop_path=0.6).train(), torch.randn(8, 5, 12).double().requires_grad_()
    torch.manual_seed(3)
    wanted = timm_blocks(vit, tokens)
    torch.manual_seed(3)
    found = run_blocks(list(vit.blocks), tokens, None, memory)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    for a, b in zip(slopes(vit, found, tokens), slopes(vit, wanted, tokens), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert not torch.equal(wanted, timm_blocks(vit.eval(), tokens))


def drop_by_batch(vit: ViT, tokens: Tensor) -> Tensor:
    """The oracle: of each half of a block only some samples are computed, one after the other."""
    num = len(tokens)
    for block in vit.blocks:
        halves = (
            (block.drop_path1, lambda x, b=block: b.ls1(b.attn(b.norm1(x)))),
            (block.drop_path2, lambda x, b=block: b.ls2(b.mlp(b.norm2(x)))),
        )
        probs = [getattr(path, "drop_prob", 0.0) for path, _ in halves]
        kept = [
            torch.randperm(num)[: max(int(num * (1 - p)), 1)] if p else torch.arange(num)
            for p in probs
        ]
        for rows, (_, half) in zip(kept, halves, strict=True):
            more = [half(tokens[i : i + 1])[0] * num / len(rows) for i in rows.tolist()]
            added = dict(zip(rows.tolist(), more, strict=True))
            tokens = torch.stack([x + added[i] if i in added else x for i, x in enumerate(tokens)])
    return tokens


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("num_queries", [None, 1])
@pytest.mark.parametrize("memory", ["high", "normal", "low"])
def test_a_part_of_the_batch_goes_through_a_block(
    memory: Memory, num_queries: int | None, uniform: bool
) -> None:
    """Values and slopes are those of samples taken one by one, for other samples in each half."""
    vit = make_vit(drop_path=0.6, drop_path_by="batch", drop_path_uniform=uniform, init_values=0.5)
    tokens = torch.randn(8, 5, 12).double().requires_grad_()
    torch.manual_seed(3)
    wanted = drop_by_batch(vit.train(), tokens)[:, :num_queries]
    torch.manual_seed(3)
    found = run_blocks(list(vit.blocks), tokens, num_queries, memory, drop_path_by="batch")
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    for a, b in zip(slopes(vit, found, tokens), slopes(vit, wanted, tokens), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    whole = run_blocks(list(vit.eval().blocks), tokens, num_queries, memory, drop_path_by="batch")
    torch.testing.assert_close(whole, timm_blocks(vit, tokens)[:, :num_queries])


@pytest.mark.parametrize(
    ("num", "prob", "kept"),
    [(64, 0.3, 44), (128, 0.3, 89), (512, 0.3, 358), (64, 0.1, 57), (3, 0.4, 1), (1, 0.3, 1)],
)
def test_a_part_of_the_batch_has_the_references_size(num: int, prob: float, kept: int) -> None:
    """The whole samples of n(1 - p), at least one, each once, and counted n/m times."""
    block = ViT(depth=1, embed_dim=12, num_heads=2, drop_path=prob, drop_path_uniform=True).blocks[
        0
    ]
    tokens = torch.zeros(num, 1, 12)
    for rows in draw_drops(block, tokens, "batch", False):
        assert rows is not None
        assert len(set(rows.tolist())) == len(rows) == kept
    for scale in draw_drops(block, tokens, "batch", True):
        assert scale is not None
        assert sorted(scale.flatten().tolist())[-kept:] == pytest.approx([num / kept] * kept)
        assert int((scale > 0).sum()) == kept


def test_what_is_dropped_by_batch_is_not_computed() -> None:
    """Half of the rows reach the layers of each block."""
    vit = make_vit(drop_path=0.5, drop_path_uniform=True, drop_path_by="batch").train()
    seen: list[int] = []
    for block in vit.blocks:
        for layer in (block.attn.qkv, block.mlp.fc1):
            layer.register_forward_hook(lambda _, inputs, out: seen.append(len(inputs[0])))
    vit(torch.randn(8, 3, 16, 16).double())
    assert seen == [4] * 6


@pytest.mark.parametrize("num_tokens", [3, 128, 129])
def test_every_kernel_of_attention_gives_the_softmax(num_tokens: int) -> None:
    """The plain one for few tokens and the fused one for many."""
    query, key, value = torch.randn(3, 2, 2, num_tokens, 4).double().unbind(0)
    weights = (query @ key.transpose(-2, -1) * 0.7).softmax(-1)
    found = attention(query, key, value, 0.7)
    torch.testing.assert_close(found, weights @ value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_less_memory_keeps_less(mlp: str) -> None:
    """Bytes kept for the backward pass fall from high over normal to low."""
    vit, tokens = make_vit(depth=4, mlp=mlp), torch.randn(4, 9, 12).double().requires_grad_()
    kept: dict[Memory, int] = {}
    for memory in ("high", "normal", "low"):
        storages: dict[int, Tensor] = {}

        def keep(tensor: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = run_blocks(list(vit.blocks), tokens, None, memory)
        weights = {p.untyped_storage().data_ptr() for p in vit.parameters()}
        kept[memory] = sum(
            t.untyped_storage().nbytes() for at, t in storages.items() if at not in weights
        )
        assert out.requires_grad
    assert kept["normal"] < 0.85 * kept["high"]
    assert kept["low"] < 0.3 * kept["normal"]


@pytest.mark.parametrize("changes", [{}, {"mlp": "swiglu", "init_values": 0.5}])
def test_under_bfloat16_autocast_the_slopes_are_near_float32s(changes: dict[str, Any]) -> None:
    """An activation that is made again sees the same half precision as the first time."""
    vit = make_vit(**changes).float()
    tokens = torch.randn(2, 5, 12, requires_grad=True)
    exact = slopes(vit, run_blocks(list(vit.blocks), tokens), tokens)
    for memory in ("high", "normal", "low"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run_blocks(list(vit.blocks), tokens, None, memory)
        for a, b in zip(slopes(vit, out.float(), tokens), exact, strict=True):
            assert a.dtype == torch.float32
            assert float((a - b).norm()) < 0.05 * float(b.norm()) + 1e-6


@pytest.mark.parametrize("learned", [[0.25], [0.0], [0.1, 0.2, 0.0, 0.4, 0.5]])
def test_an_activation_with_weights_is_trained_whatever_is_kept(learned: list[float]) -> None:
    """A PReLU's slopes get their gradient in all three, one or many, also where they are 0."""
    found = []
    for memory in ("high", "normal", "low"):
        torch.manual_seed(0)
        vit = ViT(
            image_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, act_layer="prelu"
        )
        for block in vit.blocks:  # several slopes are those of the tokens
            block.mlp.act.weight = nn.Parameter(torch.tensor(learned))
        run_blocks(list(vit.blocks), torch.randn(2, 5, 12), None, memory).square().sum().backward()
        found.append([block.mlp.act.weight.grad for block in vit.blocks])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_memory_is_set_in_every_transformer_inside() -> None:
    """Wherever it lies; other parts are left alone."""
    inner = make_vit()
    set_memory(nn.ModuleDict({"a": nn.Sequential(inner), "b": nn.Linear(1, 1)}), "low", True)
    assert (inner.memory, inner.compiled) == ("low", True)


def same_compiled(changes: dict[str, Any], backend: str) -> None:
    """Class features and slopes of compiled blocks are those of plain ones; graphs are counted."""
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "drop_path": 0.5}
    vit = build_backbone({**sizes, **changes}).double().train()
    images = torch.randn(4, 3, 16, 16).double()
    found = []
    with patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        for compiled in (False, True):
            vit.compiled = compiled
            torch.manual_seed(1)
            vit.zero_grad()
            cls = vit(images, cls_only=True).cls
            cls.square().sum().backward()
            found.append([cls.detach(), *(p.grad.clone() for p in vit.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= 3  # the first, those between, and the last


def whole_step() -> None:
    """Two steps and an evaluation, counting graphs."""
    from test_dino import make_step, random_crops, tiny_dino

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    method = tiny_dino(drop_path=0.3)
    set_memory(method, "normal", True)
    step = make_step(method, micro_batch_size=3)
    with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        for _ in range(2):
            step(random_crops(8), Progress(0, 10, 5))
        stats = torch._dynamo.utils.counters["stats"]
        trained = stats["unique_graphs"]
        with torch.inference_mode():
            method.export_backbone()(torch.randn(5, 3, 24, 24))
    assert stats["unique_graphs"] == trained, "an evaluation was compiled"
    # two sizes of crops, first and last block, micro-batches of 3 and 2; two of the teacher's
    assert 0 < trained <= 2 * 2 * 2 + 2


@pytest.mark.slow
def test_a_whole_step_compiles_few_graphs_and_evaluations_none() -> None:
    """Crops of two sizes, stochastic depth, uneven micro-batches: below torch's limit."""
    apart(whole_step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 16},
        {"image_size": 16, "mlp": "swiglu", "init_values": 0.5, "num_registers": 2},
        {"image_size": 16, "drop_path_by": "batch"},
        {"image_size": 16, "drop_path_by": "batch", "drop_path_uniform": True},
        {"kind": "rope", "mlp": "swiglu", "qkv_bias": True, "rope_rescale": 2.0},
    ],
)
def test_compiled_blocks_give_the_same_and_share_a_graph(changes: dict[str, Any]) -> None:
    """Graphs forward and backward; no code is generated here."""
    apart(same_compiled, changes, "aot_eager")


@pytest.mark.slow
def test_the_code_that_is_generated_gives_the_same() -> None:
    """As runs compile: layer scale, registers and a gated MLP have every kind of operation."""
    changes = {"image_size": 16, "mlp": "swiglu", "init_values": 0.5, "num_registers": 2}
    apart(same_compiled, changes, "inductor")
