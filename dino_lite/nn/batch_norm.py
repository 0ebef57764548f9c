"""Batch normalization with statistics over all processes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_lite.contracts import UserError
from dino_lite.distributed import all_reduce_sum, is_distributed, rank, world_size


def across_ranks(module: nn.Module) -> None:
    """Convert, in place, all batch normalization in `module` to `BatchNorm`, so that several
    processes train as one does, also with different numbers of images. Parameters, buffers and
    their names stay. Raises UserError for other batch normalization than torch's BatchNorm1d and
    BatchNorm2d with affine weights and running statistics.
    """
    for part in module.modules():
        usual = type(part) in (nn.BatchNorm1d, nn.BatchNorm2d) and part.affine
        if usual and part.track_running_stats and part.momentum is not None:
            part.__class__ = BatchNorm
        elif isinstance(part, _BatchNorm) and not isinstance(part, BatchNorm):
            raise UserError(
                f"{type(part).__name__} in this network cannot be synchronized across processes: "
                "train in one process, or choose another backbone."
            )


class BatchNorm(_BatchNorm):
    """Batch normalization (Ioffe & Szegedy 2015) that in training uses the mean and variance over
    all processes; in a single process and in evaluation it is torch's. (torch.nn.SyncBatchNorm
    requires a GPU.)
    """

    def forward(self, x: Float[Tensor, "n C *places"]) -> Float[Tensor, "n C *places"]:
        if not self.training or not is_distributed():
            alone: Tensor = super().forward(x)
            return alone
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        num = mean.new_full((1,), x.numel() / x.shape[1])
        # A rank without images has no mean, but must take part in the reductions, backward too.
        mean, var = (each.where(num > 0, 0.0) for each in (mean, var))
        # Each process fills its own row of zeros, so that one all-reduce gathers all of them.
        own = torch.arange(world_size(), device=x.device)[:, None] == rank()
        rows = all_reduce_sum(torch.where(own, torch.cat([num, mean, var]), 0.0))
        nums, (means, vars_) = rows[:, :1], rows[:, 1:].chunk(2, dim=1)
        total = nums.sum()
        mean = (nums * means).sum(0) / total
        var = (nums * (vars_ + (means - mean).square())).sum(0) / total
        self._follow(mean, var * (total / (total - 1)))
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        shape = [-1] + [1] * (x.dim() - 2)
        return (wide * scale.view(shape) + shift.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Float[Tensor, "C"], var: Float[Tensor, "C"]) -> None:
        """Update the running statistics."""
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            assert running is not None
            running.lerp_(new.to(running), self.momentum)

    def _check_input_dim(self, x: Tensor) -> None:
        """Accepts any number of spatial dimensions."""
