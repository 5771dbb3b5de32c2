"""
The world model predicts what it was not trained on, and planning through it makes a policy that has learned nothing good.

After a training with the defaults, on the steps of new episodes of the trained policy (with its noise), all windows of
``horizon`` steps: the squared error of the rewards that the model predicts open-loop, and of its latents against the encoded
observations, as parts of what the best constant makes. At most 0.5 of both.

On Pendulum-v1 and CartPole-v1 also: the policy's initial weights are put back, and the planner plans with them through the
trained model and its values. That must gain at least half of what the trained policy gains. Both gains count from the
initial policy as it is, with its noise; trained and planned actions are deterministic. CartPole's rewards are constant:
their prediction is not judged.

``python -m benchmarks.parts.world_model --env HalfCheetah-v5``
"""

import argparse
import copy

import numpy as np
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.envs import vec_env
from benchmarks.parts.common import Verdicts
from benchmarks.parts.held_out import play, prediction_errors
from sb3_m3po import M3PO

STEPS = {"Pendulum-v1": 8_000, "CartPole-v1": 8_000, "HalfCheetah-v5": 10_000}
PLANNED = ("Pendulum-v1", "CartPole-v1")
MAX_RATIO, MIN_SHARE = 0.5, 0.5
HELD_OUT_SEED, EVALUATION_SEED, N_EPISODES = 300_000_000, 400_000_000, 10


def judge_predictions(verdicts: Verdicts, model: M3PO, args: argparse.Namespace) -> None:
    """Judge the predictions on held-out episodes."""
    played = play(model, args.env, HELD_OUT_SEED + 1_000 * args.seed)
    errors = prediction_errors(model, played, model.horizon)
    print(f"{len(played)} held-out episodes, {sum(len(episode.rewards) for episode in played)} steps")
    for name, found, constant in (
        ("rewards", errors.reward, errors.reward_constant),
        ("latents", errors.latent, errors.latent_constant),
    ):
        if constant.max() < 1e-9:
            print(f"{name} do not vary: not judged; squared error {found.mean():.3g}")
            continue
        ratio, steps = found.sum() / constant.sum(), ", ".join(f"{x:.3f}" for x in found / constant)
        text = f"{ratio:.3f} of that of the best constant, by step {steps} (at most {MAX_RATIO})"
        verdicts.judge(ratio <= MAX_RATIO, f"{len(found)}-step {name}: squared error {found.mean():.3g}, {text}")


def score(model: M3PO, env: VecEnv, samples: int = 0, iterations: int = 1, deterministic: bool = True) -> float:
    """:return: mean return of one episode in each environment, with the same start states each time"""
    env.seed(EVALUATION_SEED)
    th.manual_seed(0)
    with model.set_planning(samples, iterations):
        return float(np.mean(evaluate_policy(model, env, n_eval_episodes=env.num_envs, deterministic=deterministic)[0]))


def judge_planning(verdicts: Verdicts, model: M3PO, initial: dict[str, th.Tensor], args: argparse.Namespace) -> None:
    """Judge what planning gains with the initial policy."""
    env = vec_env(args.env, N_EPISODES, 0)
    trained = score(model, env)
    model.policy.mean.world_model.actor.load_state_dict(initial)  # which is what predicts
    noisy, plain = score(model, env, deterministic=False), score(model, env)
    planned = score(model, env, args.samples, args.iterations)
    share = (planned - noisy) / (trained - noisy) if trained > noisy else 0.0
    text = f"initial policy {noisy:.1f} ({plain:.1f} without its noise), planning with it {planned:.1f}, trained {trained:.1f}"
    verdicts.judge(share >= MIN_SHARE, f"{text}: {share:.2f} of the gain (at least {MIN_SHARE})")


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1", choices=STEPS)
    parser.add_argument("--steps", type=int, help=f"environment steps of training, by default one of {STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=64, help="the planner's action sequences per iteration")
    parser.add_argument("--iterations", type=int, default=2, help="the planner's")
    parser.add_argument("--horizon", type=int, default=3, help="the planner's")
    args = parser.parse_args(argv)
    steps = args.steps or STEPS[args.env]
    verdicts = Verdicts(f"World model, {args.env}, {steps} steps, seed {args.seed}")
    env, planner = vec_env(args.env, 1, args.seed), dict(horizon=args.horizon)
    model = M3PO("MlpPolicy", env, planner_kwargs=planner, seed=args.seed, device="cpu")
    initial = copy.deepcopy(model.policy.world_model.actor.state_dict())
    model.learn(steps)
    judge_predictions(verdicts, model, args)
    if args.env in PLANNED:
        judge_planning(verdicts, model, initial, args)
    verdicts.exit()


if __name__ == "__main__":
    main()
