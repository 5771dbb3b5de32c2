"""Experience that a model was not trained on, and how well it is predicted."""

from typing import NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces

from benchmarks.envs import make_env
from sb3_m3po import M3PO


class Episode(NamedTuple):
    """
    What happened in one episode.

    :param observations: with the last one, shape ``(length + 1, ...)``
    :param actions: as the world model takes them, shape ``(length, input_dim)``
    :param rewards: shape ``(length,)``
    """

    observations: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor


def play(model: M3PO, env_id: str, seed: int, episodes: int = 4, steps: int = 2_000) -> list[Episode]:
    """
    Act stochastically by the policy.

    :param model: what was trained
    :param env_id: see :func:`~benchmarks.envs.make_env`
    :param seed: of the first episode, which training must not have seen
    :param episodes: how many episodes at least
    :param steps: how many steps at least
    :return: whole episodes
    """
    env = make_env(env_id)
    played: list[Episode] = []
    th.manual_seed(seed)
    while len(played) < episodes or sum(len(episode.rewards) for episode in played) < steps:
        obs, _ = env.reset(seed=seed + len(played))
        observations, actions, rewards, ended = [obs], [], [], False
        while not ended:
            action, _ = model.predict(obs, deterministic=False)
            obs, reward, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            observations.append(obs)
            actions.append(model.policy.scale_action(action) if isinstance(env.action_space, spaces.Box) else action)
            rewards.append(float(reward))
        inputs = model.policy.world_model.codec.to_input(th.as_tensor(np.stack(actions)))
        played.append(Episode(th.as_tensor(np.stack(observations)), inputs, th.tensor(rewards)))
    env.close()
    return played


class Errors(NamedTuple):
    """
    Mean squared errors by step of the prediction, each of shape ``(horizon,)``.

    :param reward: of the predicted reward
    :param reward_constant: of the mean of all rewards
    :param latent: of the predicted latent
    :param latent_constant: of the mean of all latents
    """

    reward: np.ndarray
    reward_constant: np.ndarray
    latent: np.ndarray
    latent_constant: np.ndarray


@th.no_grad()
def prediction_errors(model: M3PO, played: list[Episode], horizon: int) -> Errors:
    """
    Roll the model open-loop through all windows of the episodes, with the actions that were executed.

    :param model: what was trained
    :param played: episodes
    :param horizon: steps of a window
    :return: errors; the step ``k`` of a reward is the ``k``-th, from 0; that of a latent is the one it leads to
    """
    policy, world_model = model.policy, model.policy.world_model
    latents = [policy.encode(episode.observations) for episode in played]
    mean_reward, mean_latent = th.cat([episode.rewards for episode in played]).mean(), th.cat(latents).mean(0)
    rows: list[list[list[th.Tensor]]] = [[[] for _ in range(horizon)] for _ in range(4)]
    for episode, real in zip(played, latents, strict=True):
        n = len(episode.rewards) - horizon + 1
        z = real[: max(n, 0)]
        for k in range(horizon if n > 0 else 0):
            window = slice(k, k + n)
            z, reward, _ = world_model.step(z, episode.actions[window])
            rewards, following = episode.rewards[window], real[k + 1 : k + 1 + n]
            found = (policy.return_scale * reward - rewards, mean_reward - rewards, z - following, mean_latent - following)
            for row, error in zip(rows, found, strict=True):
                row[k].append(error.square().flatten())
    return Errors(*(np.array([th.cat(errors).mean().item() for errors in row]) for row in rows))
