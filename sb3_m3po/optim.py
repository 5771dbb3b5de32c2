"""The optimizer of all networks and coefficients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th


class _Packed(NamedTuple):
    """The state of one group of parameters, as the fused kernel takes it; ``steps`` are views of ``counter``."""

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

    _packed: list[_Packed] | None = None
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
        gradients = [[parameter.grad for parameter in group["params"]] for group in self.param_groups]
        n_gradients = sum(gradient is not None for group in gradients for gradient in group)
        if closure is not None or not n_gradients == len(self.state) == sum(map(len, gradients)):
            # The first step, which makes the state, or not all parameters take part
            self._packed = None
            return super().step(closure)
        if self._packed is None or self._packed_of is not self.state:
            self._packed, self._packed_of = [self._pack(group["params"]) for group in self.param_groups], self.state
        for group, grads, packed in zip(self.param_groups, gradients, self._packed, strict=True):
            packed.counter.add_(1)
            th._fused_adamw_(
                group["params"],
                grads,
                packed.exp_avgs,
                packed.exp_avg_sqs,
                [],
                packed.steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
        return None

    def _pack(self, params: list[th.Tensor]) -> _Packed:
        states = [self.state[parameter] for parameter in params]
        counter = th.stack([state["step"] for state in states])
        for state, step in zip(states, counter.unbind(), strict=True):
            state["step"] = step
        return _Packed(
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            counter,
        )
