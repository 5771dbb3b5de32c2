"""Learn from pixels: a grid world seen from above, ``python examples/images.py [steps]``. Needs ``minigrid``."""

import sys

import gymnasium as gym
import minigrid  # noqa: F401 (registers the environments)
from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_m3po import M3PO


def make_env() -> gym.Env:
    """:return: MiniGrid's empty room as a 40 x 40 RGB image"""
    return Monitor(ImgObsWrapper(RGBImgObsWrapper(gym.make("MiniGrid-Empty-5x5-v0"))))


def main(steps: int = 10_000) -> float:
    """
    :param steps: Environment steps to learn from
    :return: Mean return of the learned policy; 0.955 is the best possible
    """
    # Images stay uint8 in the replay memory and are stored once
    model = M3PO("CnnPolicy", make_env(), buffer_size=50_000, seed=0, verbose=1)
    model.learn(steps)
    mean, std = evaluate_policy(model, make_env(), n_eval_episodes=10)
    print(f"Mean return over 10 episodes: {mean:.3f} +- {std:.3f}")
    return float(mean)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
