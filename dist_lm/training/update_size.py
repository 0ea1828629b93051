"""How far an optimizer step moves the parameters, whatever the optimizer."""

import torch
from torch.utils.hooks import RemovableHandle

from dist_lm.parallel.gradients import is_first_copy
from dist_lm.parallel.padding import shard_of


class UpdateSize:
    """Watches a step when it is asked to. From `watch` to `squares`, and only where the optimizer was called in between
    (a skipped step calls it not), a copy of this rank's shards is held: behind the backward pass, when activations are
    gone."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._counted = [parameter for parameter in parameters if is_first_copy(parameter)]
        self._before: list[torch.Tensor] = []
        self._hook: RemovableHandle | None = None

    def watch(self) -> None:
        """The next step is the one."""
        self._hook = self._optimizer.register_step_pre_hook(lambda *_: self._remember())

    @torch.no_grad()
    def squares(self) -> torch.Tensor:
        """This rank's part of the squared L2 norms of what the step changed and of the parameters after it: (2,)
        float64; the parts of all ranks add up. Zeros where it changed nothing."""
        if self._hook:
            self._hook.remove()
            self._hook = None
        before, self._before = self._before, []
        if not before:
            return torch.zeros(2, dtype=torch.float64)
        now = [shard_of(parameter) for parameter in self._counted]
        torch._foreach_sub_(before, now)
        norms = [torch.stack(torch._foreach_norm(part)) for part in (before, now)]
        return torch.stack([part.double().square().sum() for part in norms])

    @torch.no_grad()
    def _remember(self) -> None:
        self._before = [shard_of(parameter).clone() for parameter in self._counted]
