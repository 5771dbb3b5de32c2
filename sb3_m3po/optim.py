"""The optimizer of all networks and coefficients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th


class _Packed(NamedTuple):
    """
    Parameters of one group that take their steps together, and their state, as the fused kernel takes it; ``steps`` are views
    of ``counter``.
    """

    group: dict[str, Any]
    params: list[th.Tensor]
    exp_avgs: list[th.Tensor]
    exp_avg_sqs: list[th.Tensor]
    steps: list[th.Tensor]
    counter: th.Tensor


class FusedAdamW(th.optim.AdamW):
    """
    :class:`torch.optim.AdamW` with its fused kernel, equal to it to the bit, its state included; but what the kernel takes is
    gathered once and not at every step: for networks of this size that took longer than the arithmetic.

    :param params: Parameters or groups of them
    :param lr: Learning rate
    :param betas: Rates of the running means of gradients and of their squares
    :param eps: Added to the denominator
    :param weight_decay: Weight decay, decoupled from the gradient
    """

    _packed: tuple[_Packed, ...] = ()
    #: The state that was gathered: one that is loaded is another object
    _packed_of: dict[th.Tensor, Any] | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
    ):
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @th.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """
        Take one step.

        :param closure: See :class:`torch.optim.AdamW`
        :return: What the closure returns
        """
        moving = [parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        if closure is not None or any(parameter not in self.state for parameter in moving):
            # It makes the state of those that move for the first time
            return super().step(closure)
        for packed in self._pack(len(moving)):
            packed.counter.add_(1)
            th._fused_adamw_(
                packed.params,
                [parameter.grad for parameter in packed.params],  # type: ignore[misc]
                packed.exp_avgs,
                packed.exp_avg_sqs,
                [],
                packed.steps,
                lr=packed.group["lr"],
                beta1=packed.group["betas"][0],
                beta2=packed.group["betas"][1],
                weight_decay=packed.group["weight_decay"],
                eps=packed.group["eps"],
                amsgrad=False,
                maximize=False,
            )
        return None

    def _pack(self, n_moving: int) -> list[_Packed]:
        """:return: All parameters that have a gradient, as few lists as they take their steps in"""
        if self._packed_of is not self.state:
            self._packed, self._packed_of = (), self.state
        gradients = [[parameter.grad is not None for parameter in packed.params] for packed in self._packed]
        if any(any(some) and not all(some) for some in gradients):
            # Their ways have parted
            self._packed, gradients = (), []
        moving = [packed for packed, some in zip(self._packed, gradients, strict=True) if all(some)]
        if sum(len(packed.params) for packed in moving) < n_moving:
            known = {id(parameter) for packed in self._packed for parameter in packed.params}
            new = [packed for group in self.param_groups if (packed := self._packed_group(group, known)).params]
            self._packed += tuple(new)
            moving += new
        return moving

    def _packed_group(self, group: dict[str, Any], known: set[int]) -> _Packed:
        """:return: Parameters of a group that move and are not known yet"""
        params = [parameter for parameter in group["params"] if parameter.grad is not None and id(parameter) not in known]
        states = [self.state[parameter] for parameter in params]
        counter = th.stack([state["step"] for state in states]) if states else th.zeros(0)
        for state, step in zip(states, counter.unbind(), strict=True):
            state["step"] = step
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        return _Packed(group, params, means, squares, steps, counter)
