"""One agent, three tasks of different shapes: ``python examples/three_tasks.py [steps]``."""

import sys

import gymnasium as gym

from sb3_m3po import M3PO, evaluate_per_task, make_multitask_vec_env


def gentle_pendulum() -> gym.Env:
    """
    :return: A task may be anything that makes an environment: here a pendulum on a small planet
    """
    return gym.make("Pendulum-v1", g=4.0)


def main(steps: int = 12_000, episodes: int = 10) -> dict[str, float]:
    """
    :param steps: Environment steps to learn from, over all tasks
    :param episodes: Episodes of each task in the evaluation
    :return: Mean returns by the tasks' names
    """
    tasks = ["Pendulum-v1", "MountainCarContinuous-v0", gentle_pendulum]
    env = make_multitask_vec_env(tasks, n_envs_per_task=1, seed=0)
    print(f"Observations: {env.observation_space}\nActions: {env.action_space}")

    model = M3PO("MultiInputPolicy", env, seed=0, verbose=1)
    model.learn(steps)

    scores = evaluate_per_task(model, make_multitask_vec_env(tasks, seed=1_000), n_eval_episodes=episodes)
    print(scores)
    return dict(scores)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
