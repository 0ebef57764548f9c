"""What stays still while the rest of a method is trained: the backbone for a while, or its first
blocks; with it the running statistics of its batch normalization, in student and teachers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_lite.contracts import Backbone, UserError
from dino_lite.distributed import world_size
from dino_lite.methods.method import Method
from dino_lite.optim.param_groups import is_of_backbone
from dino_lite.wording import count


def train_last_blocks(student: nn.Module, num: int) -> None:
    """Freeze all of the backbones in `student` but the last `num` blocks and what follows them.
    Nothing is computed backward below. Raises UserError if there are fewer blocks.
    """
    for backbone in student.modules():
        if not isinstance(backbone, Backbone):
            continue
        if num > backbone.num_blocks:
            raise UserError(
                f"optim.last_blocks={num}: the backbone has {count(backbone.num_blocks, 'block')}; "
                "set it to null to train all of it."
            )
        for name, parameter in backbone.named_parameters():
            if backbone.depth_of(name) <= backbone.num_blocks - num:
                parameter.requires_grad_(False)


class Stillness:
    """Holds the student's backbone (`parameters`: what would be trained of it) for a step.

    Batch normalization that is held is in eval mode: so it is also where the weights are frozen for
    the whole run, in the student and the same layers of teachers.
    """

    def __init__(self, method: Method) -> None:
        named = method.student.named_parameters()
        self.parameters = [p for n, p in named if is_of_backbone(n) and p.requires_grad]
        of_student = {n: m for n, m in method.student.named_modules() if isinstance(m, _BatchNorm)}
        frozen = tuple(
            f".{name}"
            for name, norm in of_student.items()
            if norm.affine and not norm.weight.requires_grad
        )
        networks = [part for part in method.modules() if isinstance(part, Backbone)]
        self._all = [m for net in networks for m in net.modules() if isinstance(m, _BatchNorm)]
        self._frozen = [
            m for n, m in method.named_modules() if isinstance(m, _BatchNorm) and n.endswith(frozen)
        ]

    @contextmanager
    def held(self, whole: bool) -> Iterator[None]:
        """Context of a step; `whole`: of one in which the backbone does not change. In a single
        process its backward pass is then left out; DDP waits for every gradient.
        """
        norms = [norm for norm in (self._all if whole else self._frozen) if norm.training]
        stopped = self.parameters if whole and world_size() == 1 else []
        for norm in norms:
            norm.eval()
        for parameter in stopped:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for norm in norms:
                norm.train()
            for parameter in stopped:
                parameter.requires_grad_(True)
