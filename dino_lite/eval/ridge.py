"""A linear classifier on frozen features without training: least squares, in closed form."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from dino_lite.eval.features import Features


def ridge_correct(bank: Features, penalty: float = 1e-3) -> Bool[Tensor, "N"]:
    """Whether each image is classified right by the ridge regression of all the others.

    Features are scaled to unit variance and classes coded as 0 and 1; `penalty` times N weighs the
    squared weights, the intercept is free. All N fits come of one: leaving out image i turns its
    residual r_i into r_i / (1 − h_i), with the hat matrix's diagonal h (Allen 1974). Of classes
    with equal scores the lower comes first.
    """
    # penalty, measured on the embedded set: of 1e-5 to 1 within 2.5 points of the best, both with
    # 2,000 images and with 200; logistic regression in five folds is 4 to 8 points better.
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
