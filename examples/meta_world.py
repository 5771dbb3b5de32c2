"""One agent for Meta-World's ten tasks, MT10; needs the extra ``envs``: ``python examples/meta_world.py [steps]``."""

import os
import sys

os.environ.setdefault("MUJOCO_GL", "disable")

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_m3po import M3PO, Task, TaskEvalCallback, TaskScores, evaluate_per_task, make_multitask_vec_env

# A decision every four frames, and 50 in an episode; with this discount factor the agent looks about 33 of them ahead
MT10 = Task("Meta-World/MT10", gamma=0.97, env_kwargs={"max_episode_steps": 200}, action_repeat=4)


def main(steps: int = 250_000, episodes: int = 10, vec_env_cls: type[VecEnv] = SubprocVecEnv) -> TaskScores:
    """
    :param steps: Decisions to learn from, over all tasks
    :param episodes: Episodes of each task in the last evaluation
    :param vec_env_cls: ``SubprocVecEnv`` gives each training environment a process of its own
    :return: Returns and successes of each task
    """
    env = make_multitask_vec_env(MT10, vec_env_cls=vec_env_cls, seed=0)
    eval_env = make_multitask_vec_env(MT10, seed=1_000)
    # Counts calls, of which one steps all ten environments
    callback = TaskEvalCallback(eval_env, eval_freq=5_000, n_eval_episodes=3, best_model_save_path="mt10")

    model = M3PO("MultiInputPolicy", env, seed=0, verbose=1)
    model.learn(steps, callback=callback)
    model.save("mt10/final_model")

    scores = evaluate_per_task(model, eval_env, n_eval_episodes=episodes)
    print(scores)
    env.close()
    return scores


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 250_000)
