"""Batch normalization over the images of all processes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_lite.contracts import UserError
from dino_lite.distributed import all_reduce_sum, is_distributed, rank, world_size


def across_ranks(module: nn.Module) -> None:
    """Let all batch normalization within count the images of all processes, however many each has:
    several processes then train as one does. Weights, statistics and their names stay. One of
    another kind than torch's usual is refused.
    """
    for part in module.modules():
        usual = type(part) in (nn.BatchNorm1d, nn.BatchNorm2d) and part.affine
        if usual and part.track_running_stats and part.momentum is not None:
            part.__class__ = BatchNorm
        elif isinstance(part, _BatchNorm) and not isinstance(part, BatchNorm):
            raise UserError(
                f"{type(part).__name__} in this network would normalize the images of each process "
                "apart from the others': train it in one process, or choose another backbone."
            )


class BatchNorm(_BatchNorm):
    """As torch's (Ioffe & Szegedy 2015) in one process, and in evaluation; in training the mean and
    variance are those of all processes. (torch.nn.SyncBatchNorm needs a GPU.)
    """

    def forward(self, x: Float[Tensor, "n C *places"]) -> Float[Tensor, "n C *places"]:
        if not self.training or not is_distributed():
            alone: Tensor = super().forward(x)
            return alone
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        num = mean.new_full((1,), x.numel() / x.shape[1])
        # No images have no mean; their rank takes part in the sums all the same, backward too.
        mean, var = (each.where(num > 0, 0.0) for each in (mean, var))
        # Each process fills a row of its own among zeros, so that one sum tells all of them.
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
        """The running statistics move toward a batch's."""
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            assert running is not None
            running.lerp_(new.to(running), self.momentum)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of places will do."""
