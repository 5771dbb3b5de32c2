"""Save, load and go on, with the replay memory: ``python examples/save_and_continue.py [steps]``."""

import sys
import tempfile
from pathlib import Path

import gymnasium as gym

from sb3_m3po import M3PO


def main(steps: int = 1_500) -> M3PO:
    """
    :param steps: Environment steps before the save, and once more after the load
    :return: The model that went on
    """
    with tempfile.TemporaryDirectory() as folder:
        zip_file, memory_file = Path(folder) / "m3po_cartpole.zip", Path(folder) / "m3po_memory.pkl"
        model = M3PO("MlpPolicy", "CartPole-v1", seed=0)
        model.learn(steps)
        model.save(zip_file)
        # The replay memory is a file of its own, as with SAC
        model.save_replay_buffer(memory_file)

        loaded = M3PO.load(zip_file, env=gym.make("CartPole-v1"))
        loaded.load_replay_buffer(memory_file)
        print(f"Loaded after {loaded.num_timesteps} steps, {loaded.replay_buffer.size()} of them in memory")
        # Without the memory it would act as before and first refill to `learning_starts`
        loaded.learn(steps, reset_num_timesteps=False)
        print(f"Went on to {loaded.num_timesteps} steps and {loaded._n_updates} updates")
    return loaded


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
