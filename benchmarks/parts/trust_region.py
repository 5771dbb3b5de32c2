"""
The trust region holds the policy near that of the last sync, and without it the policy would leave.

With the default ``target_kl`` and with none: the KL divergence from the policy of the last sync, when the next sync comes,
as the mean over observations in memory; and the logged ``train/approx_kl``, which is a mean over the updates in between.
With the trust region the mean over syncs of both must be at most 1.5 ``target_kl``, without it more than that.

``python -m benchmarks.parts.trust_region``
"""

import argparse
from typing import Any

import numpy as np
import torch as th

from benchmarks.envs import vec_env
from benchmarks.parts.common import Verdicts
from sb3_m3po import M3PO

SLACK, N_OBSERVATIONS = 1.5, 1_024


class Recorded(M3PO):
    """M3PO that records the KL of every sync period: at its end, and as logged. It trains as M3PO does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.at_end: list[float] = []
        self.logged: list[float] = []
        super().__init__(*args, **kwargs)

    @th.no_grad()
    def measure(self) -> None:
        """Compare the policy with that of the last sync, on observations of its own drawing."""
        policy, rng = self.policy, np.random.default_rng(len(self.at_end))
        states = self.replay_buffer.sample(N_OBSERVATIONS, 1, rng).states[0]
        obs = th.as_tensor(self.replay_buffer.observations_at(states))
        before, now = policy.bar.prior(policy.encode_bar(obs)), policy.world_model.prior(policy.encode(obs))
        self.at_end.append(policy.world_model.codec.kl(before, now).mean().item())

    def _sync(self) -> None:
        if self._n_updates:
            self.measure()
        super()._sync()

    def _record_finite(self, key: str, value: float) -> None:
        if key == "train/approx_kl":
            self.logged.append(value)
        super()._record_finite(key, value)


def measure(env_id: str, steps: int, seed: int, **kwargs: Any) -> Recorded:
    """
    :param env_id: see :func:`~benchmarks.envs.make_env`
    :param steps: environment steps
    :param seed: of the training
    :param kwargs: settings other than the defaults
    :return: what was trained, with its records
    """
    model = Recorded("MlpPolicy", vec_env(env_id, 1, seed), seed=seed, device="cpu", **kwargs).learn(steps)
    model.measure()
    return model


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args(argv)
    verdicts = Verdicts(f"Trust region, {args.env}, {args.steps} steps")
    for seed in args.seeds:
        held = measure(args.env, args.steps, seed)
        free = measure(args.env, args.steps, seed, target_kl=None)
        assert held.target_kl is not None
        bound = SLACK * held.target_kl
        for name, model in (("with", held), ("without", free)):
            worst = f"median {np.median(model.at_end):.3f}, largest {max(model.at_end):.3f}"
            at_end, logged = float(np.mean(model.at_end)), float(np.mean(model.logged))
            text = f"{at_end:.3f} at the end of a period ({worst}), {logged:.3f} as logged"
            passed = max(at_end, logged) <= bound if model is held else min(at_end, logged) > bound
            asked = f"{'at most' if model is held else 'more than'} {bound:g} nats"
            verdicts.judge(passed, f"seed {seed}, {name} it: mean KL of {len(model.at_end)} syncs {text} (asked for: {asked})")
    verdicts.exit()


if __name__ == "__main__":
    main()
