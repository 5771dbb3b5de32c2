"""Planning against policy on one trained model: ``python examples/planning.py [steps]``."""

import sys
import time

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_m3po import M3PO


def main(steps: int = 5_000, episodes: int = 10) -> dict[str, float]:
    """
    :param steps: Environment steps to learn from
    :param episodes: Episodes of each evaluation
    :return: Mean returns by how the actions were chosen
    """
    model = M3PO("MlpPolicy", "Pendulum-v1", seed=0)
    model.learn(steps)

    scores = {}
    for samples, iterations in ((0, 1), (32, 1), (64, 2)):
        name = f"planning, {samples} sequences x {iterations}" if samples else "policy alone"
        start = time.perf_counter()
        # 0 samples switch planning off; outside the context all is as it was
        with model.set_planning(samples, iterations):
            env = Monitor(gym.make("Pendulum-v1"))
            env.reset(seed=1)
            mean, std = evaluate_policy(model, env, n_eval_episodes=episodes)
        milliseconds = 1000 * (time.perf_counter() - start) / (200 * episodes)
        print(f"{name:28} {mean:9.1f} +- {std:6.1f}   {milliseconds:5.2f} ms per step")
        scores[name] = float(mean)  # type: ignore[arg-type]
    return scores


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
