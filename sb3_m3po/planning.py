"""How a policy plans: the switch for predictions, and their noise, which depends on nothing else."""

import time
import warnings
from typing import Any

import torch as th
from torch import nn

from sb3_m3po.actions import GaussianActions
from sb3_m3po.planner import NoiseSource, Plan, PlannerConfig, own_count, plan
from sb3_m3po.tasks import TaskReader
from sb3_m3po.world_model import WorldModel


class PlanningSwitch:
    """What :meth:`PlanningPolicy.set_planning` returns: leaving it as a context restores what was before."""

    def __init__(self, policy: "PlanningPolicy", before: tuple[PlannerConfig | None, float | None]):
        self._policy = policy
        self._before = before

    def __enter__(self) -> "PlanningSwitch":
        return self

    def __exit__(self, *_: Any) -> None:
        self._policy._planning, self._policy._planning_milliseconds = self._before


class PlanningPolicy(nn.Module):
    """What a policy with a world model needs to plan; mixed into :class:`~sb3_m3po.policies.WorldModelPolicy`."""

    world_model: WorldModel
    tasks: TaskReader | None
    #: Discount factors of tasks that only their time limit ends, and of those that have ever terminated
    lasting_gammas: th.Tensor
    ending_gammas: th.Tensor
    planner_kwargs: dict[str, Any]
    planner_config: PlannerConfig
    _planning: PlannerConfig | None
    _planning_milliseconds: float | None
    _noise_bank: dict[tuple[int, int, int], th.Tensor]

    @property
    def gammas(self) -> th.Tensor:
        """:return: Discount factor of each task, shape ``(n_tasks,)``; ``(1,)`` without tasks"""
        return th.where(self.world_model.can_terminate > 0, self.ending_gammas, self.lasting_gammas)

    def of_task(self, per_task: th.Tensor, obs: Any) -> th.Tensor:
        """
        :param per_task: A value for each task, shape ``(n_tasks,)``; shape ``(1,)`` without tasks
        :param obs: Observations, as arrays or tensors
        :return: The value of each one's task, shape ``(n,)``; ``per_task`` itself without tasks
        """
        return per_task if self.tasks is None else per_task[self.tasks.ids(obs)]

    def make_plan(self, z: th.Tensor, config: PlannerConfig, noise: NoiseSource, deadline: float | None = None) -> Plan:
        """:return: The plan from latents ``z``, see :func:`~sb3_m3po.planner.plan`"""
        gamma = self.gammas.item() if self.tasks is None else self.world_model.at(self.gammas, z)
        planned = plan(self.world_model, self.world_model.codec, z, gamma, config, noise, deadline)
        not_nan(planned.gain)
        return planned

    def set_planning(self, samples: int | None = 64, iterations: int = 2, milliseconds: float | None = None) -> PlanningSwitch:
        """
        Let the predictions that follow plan, or not. As a context manager, until the context ends.

        With a budget of samples and iterations a deterministic prediction is a pure function of the observation and draws
        nothing from any global random generator. A budget of milliseconds depends on the machine and can't be pure.

        :param samples: Action sequences per iteration; 0, ``None`` or ``False`` switches planning off, ``True`` means 64
        :param iterations: Rounds of drawing
        :param milliseconds: Iterate until so much time has passed since the plan began, instead of ``iterations`` rounds
        :return: A context manager that restores what was before
        :raises ValueError: for a budget that is negative, or no time at all
        """
        before = (self._planning, self._planning_milliseconds)
        samples = 64 if samples is True else samples
        if (samples or 0) < 0 or iterations < 1:
            raise ValueError(
                f"samples={samples} must not be negative (0: no planning), and iterations={iterations} at least 1"
            )
        if milliseconds is not None and milliseconds <= 0:
            raise ValueError(f"milliseconds={milliseconds} must be positive; set_planning(0) switches planning off")
        if not samples:
            self._planning = self._planning_milliseconds = None
            return PlanningSwitch(self, before)
        if milliseconds is not None:
            warnings.warn(
                "Planning for a number of milliseconds depends on the machine's speed: predictions are not reproducible. "
                "Give samples and iterations instead where that matters.",
                stacklevel=2,
            )
        kwargs = {**self.planner_kwargs, "n_samples": samples, "n_iterations": iterations}
        kwargs["n_effective"] = min(self.planner_config.n_effective, samples)
        self._planning, self._planning_milliseconds = PlannerConfig(**kwargs), milliseconds
        return PlanningSwitch(self, before)

    def _plan_for_prediction(self, z: th.Tensor, config: PlannerConfig) -> Plan:
        """Plan with the fixed noise bank, the same for every row of the batch."""
        iteration = -1

        def noise(horizon: int, n: int) -> th.Tensor:
            nonlocal iteration
            iteration += 1
            key = (iteration, horizon, n)
            if key not in self._noise_bank:
                generator = th.Generator().manual_seed(iteration)
                codec = self.world_model.codec
                drawn = codec.noise((horizon, 1, n), generator)
                self._noise_bank[key] = centred(drawn) if isinstance(codec, GaussianActions) else drawn
            return self._noise_bank[key]

        deadline = None
        if self._planning_milliseconds is not None:
            deadline = time.perf_counter() + self._planning_milliseconds / 1000
        return self.make_plan(z, config, noise, deadline)


def centred(noise: th.Tensor) -> th.Tensor:
    """
    Noise that serves every decision must not push them all the same way.

    :param noise: Standard normal, of the planner's sequences, shape ``(horizon, batch, n, noise_dim)``
    :return: The same with a mean of 0 over each half of the sequences, those of the policy and the wider ones
    """
    n = noise.shape[2]
    halves = noise.split([own_count(n), n - own_count(n)], 2)
    return th.cat([half - half.mean(2, keepdim=True) for half in halves], 2)


def not_nan(x: th.Tensor) -> th.Tensor:
    """
    :param x: Outputs of the networks, any shape
    :return: The same
    :raises ValueError: rather than to act on NaN; rl-zoo3 prunes a trial on it
    """
    if x.isnan().any():
        raise ValueError(
            "The model's outputs are NaN: the observation holds NaN, or the model has diverged (load an earlier checkpoint)"
        )
    return x
