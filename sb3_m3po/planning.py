"""How a policy predicts: by the mean of its recent networks, with the planner or without, and with which noise."""

import time
import warnings
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sb3_m3po.actions import GaussianActions
from sb3_m3po.planner import NoiseSource, Plan, PlannerConfig, own_count, plan
from sb3_m3po.tasks import TaskReader, known_tasks
from sb3_m3po.world_model import WorldModel


class MeanNetworks(AveragedModel):
    """
    Running mean of features extractor and world model, over the last ninth or so of their states, and no more than some 16.

    A policy can lose and find its gait several times within a thousand updates; one with the mean of its weights does so less
    often. The weight of a new state falls as in polynomial-decay averaging (arXiv 1212.1824), down to a sixteenth.

    :param features_extractor: Features extractor
    :param world_model: World model
    """

    module: nn.ModuleList

    def __init__(self, features_extractor: nn.Module, world_model: WorldModel):
        super().__init__(nn.ModuleList([features_extractor, world_model]), avg_fn=_recent_mean)
        # SB3's tests expect floating point of all that a policy saves
        self.n_averaged = self.n_averaged.float()

    @property
    def features_extractor(self) -> BaseFeaturesExtractor:
        """:return: The features extractor of mean weights"""
        return self.module[0]  # type: ignore[return-value]

    @property
    def world_model(self) -> WorldModel:
        """:return: The world model of mean weights"""
        return self.module[1]  # type: ignore[return-value]

    def update(self, features_extractor: nn.Module, world_model: WorldModel) -> None:
        """
        :param features_extractor: As it is now
        :param world_model: As it is now
        """
        self.update_parameters(nn.ModuleList([features_extractor, world_model]))


def _recent_mean(mean: th.Tensor, now: th.Tensor, n_averaged: th.Tensor | int) -> th.Tensor:
    return mean.lerp(now, max(9 / (9 + float(n_averaged)), 1 / 16))


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
    """How a policy with a world model predicts and plans; mixed into :class:`~sb3_m3po.policies.WorldModelPolicy`."""

    features_extractor: Any
    world_model: WorldModel
    #: What predicts
    mean: MeanNetworks
    observation_space: spaces.Space
    tasks: TaskReader | None
    task_key: str | None
    gamma: float | str
    time_limit: int | None
    #: Discount factors of tasks that only their time limit ends, and of those that have ever terminated
    lasting_gammas: th.Tensor
    ending_gammas: th.Tensor
    planner_kwargs: dict[str, Any]
    planner_config: PlannerConfig
    _planning: PlannerConfig | None
    _planning_milliseconds: float | None
    _noise_bank: dict[tuple[int, int, int], th.Tensor]
    encode: Callable[[PyTorchObs], th.Tensor]
    _values: Callable[..., th.Tensor]
    generator: th.Generator | None
    device: th.device

    @property
    def gammas(self) -> th.Tensor:
        """:return: Discount factor of each task, shape ``(n_tasks,)``; ``(1,)`` without tasks"""
        return th.where(self.world_model.can_terminate > 0, self.ending_gammas, self.lasting_gammas)

    def set_time_limit(self, time_limit: int | None, observation_space: spaces.Space | None = None) -> None:
        """
        :param time_limit: Decisions after which episodes of tasks are cut that don't know it themselves, which their discounts
            follow where ``gamma`` is ``"auto"``; ``None`` if they aren't
        :param observation_space: The same as the policy's but for the time limits that its tasks know; ``None`` for its own
        """
        self.time_limit = time_limit
        if observation_space is not None:
            self.observation_space = observation_space
        table = known_tasks(self.observation_space, self.tasks, self.task_key)
        for gammas, can_terminate in ((self.lasting_gammas, False), (self.ending_gammas, True)):
            gammas.copy_(th.as_tensor(table.gammas(self.gamma, time_limit, can_terminate)))

    def of_task(self, per_task: th.Tensor, obs: Any) -> th.Tensor:
        """
        :param per_task: A value for each task, shape ``(n_tasks,)``; shape ``(1,)`` without tasks
        :param obs: Observations, as arrays or tensors
        :return: The value of each one's task, shape ``(n,)``; ``per_task`` itself without tasks
        """
        return per_task if self.tasks is None else per_task[self.tasks.ids(obs)]

    def average(self, restart: bool = False) -> None:
        """
        Take the networks as they are into the mean that predicts, as ``learn`` does now and then.

        :param restart: Forget the mean, and predict by the networks as they are: for weights that were changed outside of
            ``learn``
        """
        if restart:
            self.mean.n_averaged.zero_()
        self.mean.update(self.features_extractor, self.world_model)

    def _decide(self, z: th.Tensor, deterministic: bool) -> th.Tensor:
        """:return: Actions for latents of the mean networks, shape ``(batch, ...)``"""
        model, codec = self.mean.world_model, self.mean.world_model.codec
        if self._planning is not None:
            planned = self._plan_for_prediction(z, self._planning)
            if deterministic:
                return codec.to_env(planned.mode())
            return codec.to_env(planned.sample(codec.noise((len(z),)).to(z.device))[0])
        if deterministic:
            return codec.to_env(codec.mode(not_nan(model.mode_parameters(z))))
        return codec.to_env(codec.sample(not_nan(model.prior(z)), codec.noise((len(z),)).to(z.device))[0])

    def make_plan(
        self, model: WorldModel, z: th.Tensor, config: PlannerConfig, noise: NoiseSource, deadline: float | None = None
    ) -> Plan:
        """
        :param model: The networks that plan
        :param z: Its latents, shape ``(batch, latent_dim)``
        :param config: How much to plan
        :param noise: Where the noise of the plans comes from
        :param deadline: When to stop iterating, as of ``time.perf_counter``; ``None`` for ``config``'s rounds
        :return: See :func:`~sb3_m3po.planner.plan`
        :raises ValueError: if an observation was NaN or the model has diverged
        """
        gamma = self.gammas.item() if self.tasks is None else model.at(self.gammas, z)
        planned = plan(model, model.codec, z, gamma, config, noise, deadline)
        not_nan(planned.gain)
        return planned

    def act_by_plan(
        self, obs: PyTorchObs, noise: th.Tensor, plans: np.ndarray
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, Plan]:
        """
        Act by samples of the plan in some environments, of the policy in the others; with the collection's own generator.

        :param noise: What the samples are made of, as in :meth:`forward`
        :param plans: Which environments plan, one of them at least, shape ``(n_envs,)``
        :return: As :meth:`forward`, log-probabilities under what drew the actions; and the plan, of those that plan
        """
        z, model, noise = self.encode(obs), self.world_model, noise.to(self.device)
        rows = th.as_tensor(plans, device=self.device)
        config, draw = self.planner_config, model.codec.noise
        planned = self.make_plan(model, z[rows], config, lambda h, n: draw((h, int(plans.sum()), n), self.generator))
        params = not_nan(model.prior(z))
        inputs, log_prob = model.codec.sample(params, noise)
        inputs[rows], log_prob[rows] = planned.sample(noise[rows])
        return model.codec.to_env(inputs), self._values(z, params), log_prob, planned

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
        whole = isinstance(samples or 0, Integral) and isinstance(iterations, Integral)
        if not whole or (samples or 0) < 0 or iterations < 1:
            raise ValueError(
                f"samples={samples!r} must be a whole number and not negative (0: no planning), and iterations={iterations!r} "
                "one of at least 1"
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
        model, iteration = self.mean.world_model, -1

        def noise(horizon: int, n: int) -> th.Tensor:
            nonlocal iteration
            iteration += 1
            key = (iteration, horizon, n)
            if key not in self._noise_bank:
                generator = th.Generator().manual_seed(iteration)
                drawn = model.codec.noise((horizon, 1, n), generator)
                self._noise_bank[key] = centred(drawn) if isinstance(model.codec, GaussianActions) else drawn
            return self._noise_bank[key]

        deadline = None
        if self._planning_milliseconds is not None:
            deadline = time.perf_counter() + self._planning_milliseconds / 1000
        return self.make_plan(model, z, config, noise, deadline)


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
