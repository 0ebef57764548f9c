"""Ridge regression on frozen features in closed form, as a linear classifier."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from dino_lite.eval.features import Features


def ridge_correct(bank: Features, penalty: float = 1e-3) -> Bool[Tensor, "N"]:
    """Whether each image is classified correctly by ridge regression on all the others.

    Features are scaled to unit variance, classes are one-hot targets, the intercept is not
    penalized; `penalty` times N multiplies the squared weights. Leave-one-out follows from a single
    fit: without image i its residual r_i is r_i / (1 − h_i), with the diagonal h of the hat matrix
    (Allen 1974). Ties go to the lower class.
    """
    # penalty: on the embedded set, values from 1e-5 to 1 are within 2.5 points of the best, with
    # 2,000 and 200 images; logistic regression in five folds is 4 to 8 points better.
    _, numbers = torch.unique(bank.labels, return_inverse=True)
    x = bank.features.double()
    x = x - x.mean(0)
    scale = x.square().mean(0).sqrt()
    x = x / torch.where(scale > 0, scale, 1.0)
    y = torch.nn.functional.one_hot(numbers).double()
    gram = x.T @ x
    gram.diagonal().add_(penalty * len(x))
    root = torch.linalg.cholesky(gram)
    center = y.mean(0)
    fitted = x @ torch.cholesky_solve(x.T @ (y - center), root) + center
    hat = torch.linalg.solve_triangular(root, x.T, upper=False).square().sum(0) + 1 / len(x)
    left_out = y - (y - fitted) / (1 - hat).clamp(min=1e-9)[:, None]
    correct: Tensor = left_out.argmax(1) == numbers
    return correct
