"""Straightforward implementation of DINO's published step: the reference of bench_step.py.

Shares no code with dino_lite, whose step is optimized: timm's blocks with naive attention, one
backbone call per crop size and one head call, logits of all crops, one log-softmax per pair, AdamW
with default settings, and Python loops over parameters for clipping and for the teacher, with each
norm read by the host.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# Constant during a measurement, on both sides.
RATE, DECAY, CLIP, MOMENTUM = 5e-4, 0.04, 3.0, 0.996
STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM = 0.1, 0.04, 0.9

_OURS_ONLY = (
    *("name", "image_size", "position_offset", "position_antialias"),
    *("num_registers", "mask_token"),  # not in DINO's own networks
)
_RENAMED = {
    "head.last_layer.weight_g": "head.last_layer.parametrizations.weight.original0",
    "head.last_layer.weight_v": "head.last_layer.parametrizations.weight.original1",
}


class PlainBackbone(nn.Module):
    """Images to class features: a timm ViT with the sizes in `spec` of a `dino_lite` backbone."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        kwargs = {key: value for key, value in spec.items() if key not in _OURS_ONLY}
        kwargs |= {"img_size": spec["image_size"], "num_classes": 0}
        name = spec["name"]
        model: Any = (
            VisionTransformer(**kwargs) if name == "vit" else timm.create_model(name, **kwargs)
        )
        for block in model.blocks:
            block.attn.fused_attn = False
        self.patch_embed, self.blocks, self.norm = model.patch_embed, model.blocks, model.norm
        self.cls_token, self.pos_embed = model.cls_token, model.pos_embed
        self.offset, self.antialias = spec["position_offset"], spec["position_antialias"]

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed.proj(images)  # n D h w
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.positions(patches.shape[-2:])
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings, resampled if the grid differs from the learned one."""
        cells = self.pos_embed.shape[1] - 1
        side = math.isqrt(cells)
        if grid == (side, side):
            return self.pos_embed
        learned = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        size: dict[str, Any] = {"size": tuple(grid)}
        if self.offset:
            size = {"scale_factor": tuple((new + self.offset) / side for new in grid)}
        resampled = F.interpolate(learned, mode="bicubic", antialias=self.antialias, **size)
        return torch.cat([self.pos_embed[:, :1], resampled.flatten(2).transpose(1, 2)], dim=1)


class PlainHead(nn.Module):
    """Features to logits: three layers, L2 norm, and a weight-normalized layer of unit norms."""

    def __init__(self, in_dim: int, hidden_dim: int, bottleneck_dim: int, num: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        last = nn.Linear(bottleneck_dim, num, bias=False)
        self.last_layer = nn.utils.parametrizations.weight_norm(last)
        self.last_layer.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(features), dim=-1, p=2))


class PlainNetwork(nn.Module):
    """Crops to logits: backbone and head with the weights of a `dino_lite` student."""

    def __init__(self, spec: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone = PlainBackbone(spec)
        hidden_dim, in_dim = weights["head.mlp.0.weight"].shape
        num, bottleneck_dim = weights["head.last_layer.weight_v"].shape
        self.head = PlainHead(in_dim, hidden_dim, bottleneck_dim, num)
        self.to(weights["backbone.cls_token"].dtype)
        self.load_state_dict({_RENAMED.get(name, name): value for name, value in weights.items()})

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """One backbone call for consecutive crops of one size, one head call for all."""
        features, start = [], 0
        for stop in range(1, len(crops) + 1):
            if stop == len(crops) or crops[stop].shape[-1] != crops[start].shape[-1]:
                features.append(self.backbone(torch.cat(list(crops[start:stop]))))
                start = stop
        return self.head(torch.cat(features))


class PlainStep:
    """One optimizer step per call, given the crops of a batch, the two global ones first.

    `half`: autocast to float16 with loss scaling; otherwise computes in the precision of the
    weights. Biases and one-dimensional parameters have no weight decay.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        weights: dict[str, Tensor],
        device: torch.device,
        half: bool = False,
    ) -> None:
        network = PlainNetwork(spec, weights).to(device)
        self.student, self.teacher = network, copy.deepcopy(network).requires_grad_(False)
        self.device, self.half = device, half
        decayed, others = [], []
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                plain = name.endswith(".bias") or parameter.ndim == 1
                (others if plain else decayed).append(parameter)
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY)
        self.scaler = torch.amp.GradScaler(device.type) if self.half else None
        num = self.student.head.last_layer.out_features
        self.center = next(network.parameters()).new_zeros(1, num)

    def __call__(self, crops: Sequence[Tensor]) -> float:
        """Take a step; returns the loss."""
        with self._autocast():
            teacher = self.teacher(crops[:2])
            student = self.student(crops)
            loss = self.loss(student, teacher, len(crops))
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the plain step's loss is {value}")
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self.clip()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            self.clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.follow()
        return value

    def loss(self, student: Tensor, teacher: Tensor, num_crops: int) -> Tensor:
        """Mean over pairs of a global crop and another crop; then update the center."""
        scores = (student / STUDENT_TEMP).chunk(num_crops)
        probs = F.softmax((teacher - self.center) / TEACHER_TEMP, dim=-1).detach().chunk(2)
        total, num_pairs = 0, 0
        for i, q in enumerate(probs):
            for v, score in enumerate(scores):
                if v != i:
                    total = total + torch.sum(-q * F.log_softmax(score, dim=-1), dim=-1).mean()
                    num_pairs += 1
        with torch.no_grad():
            mean = teacher.sum(dim=0, keepdim=True) / len(teacher)
            self.center = self.center * CENTER_MOMENTUM + mean * (1 - CENTER_MOMENTUM)
        return total / num_pairs

    def clip(self) -> None:
        """Clip the gradient norm of each tensor separately; the published code reads each norm."""
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm(2).item()
                if (factor := CLIP / (norm + 1e-6)) < 1:
                    parameter.grad.mul_(factor)

    @torch.no_grad()
    def follow(self) -> None:
        """Update the teacher, tensor by tensor."""
        pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
        for value, average in pairs:
            average.mul_(MOMENTUM).add_((1 - MOMENTUM) * value.detach())

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.float16) if self.half else nullcontext()
