"""Train on one task, watch it, use it: ``python examples/one_task.py [steps]``."""

import sys

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_m3po import M3PO


def main(steps: int = 8_000) -> float:
    """
    :param steps: Environment steps to learn from
    :return: Mean return of the learned policy
    """
    model = M3PO("MlpPolicy", "Pendulum-v1", seed=0, verbose=1)
    model.learn(steps)

    env = Monitor(gym.make("Pendulum-v1"))
    mean, std = evaluate_policy(model, env, n_eval_episodes=10)
    print(f"Mean return over 10 episodes: {mean:.1f} +- {std:.1f}")

    observation, _ = env.reset(seed=0)
    action, _ = model.predict(observation, deterministic=True)
    print(f"First action of an episode: {action}")
    return float(mean)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
