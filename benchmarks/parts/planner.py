"""
The planner finds an optimum that takes three steps of looking ahead, on a hand-written model and from a uniform policy.

A vault pays 10 in the third step if three given actions come in a row, the more of each is right the more; another action
pays 1 in every step. The best first action is that of the vault for a planner that looks three steps ahead, and the
other one for a planner that looks less far. The last value is 0, and the rewards are all that the planner has.

``python -m benchmarks.parts.planner``
"""

import argparse
import math

import numpy as np
import torch as th
from gymnasium import spaces

from benchmarks.parts.common import Verdicts
from sb3_m3po.actions import ActionCodec, CategoricalActions
from sb3_m3po.masked_actions import make_action_codec
from sb3_m3po.planner import PlannerConfig, plan

DRAWS, ENOUGH, GAMMA = 100, 95, 0.9
SPACES: tuple[spaces.Space, ...] = (
    spaces.Box(-1.0, 1.0, (2,), np.float32),
    spaces.Discrete(4),
    spaces.MultiDiscrete([3, 4]),
    spaces.MultiBinary(3),
)


class Vault:
    """
    The model. Its state is the number of the step, and how right the actions so far were.

    :param codec: action codec
    """

    def __init__(self, codec: ActionCodec) -> None:
        self.codec = codec
        if isinstance(codec, CategoricalActions):
            sizes, factor = codec.uniform.count_nonzero(-1), th.arange(codec.n_factors)
            self.code, decoy = (codec.to_input((factor + shift) % sizes) for shift in (th.tensor([[1], [0], [1]]), 0))
            self.decoy = decoy[0]
        else:
            self.code, self.decoy = th.tensor([[0.6, -0.4], [-0.5, 0.5], [0.3, 0.7]]), th.tensor([-0.6, 0.6])

    def right(self, a: th.Tensor, to: th.Tensor) -> th.Tensor:
        """:return: 1 for equal actions: by factor (discrete kinds) or by distance (Box), at least 0"""
        if isinstance(self.codec, CategoricalActions):
            return (a * to).sum(-1) / self.codec.n_factors
        return (1 - (a - to).square().mean(-1)).clamp_min(0)

    def step(self, z: th.Tensor, a: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """:return: next state, reward, probability of termination"""
        number, so_far = z.unbind(-1)
        so_far = so_far * self.right(a, self.code[number.long()])
        is_decoy = self.right(a, self.decoy)
        is_decoy = (is_decoy > 0.99).float() if isinstance(self.codec, CategoricalActions) else is_decoy
        return th.stack([number + 1, so_far], -1), 10 * so_far * (number == 2) + is_decoy, th.zeros_like(number)

    def prior(self, z: th.Tensor) -> th.Tensor:
        """:return: the uniform policy"""
        return self.codec.parameters_from(th.zeros(len(z), self.codec.params_dim))

    def terminal_value(self, z: th.Tensor) -> th.Tensor:
        """:return: nothing"""
        return th.zeros(len(z))


def found(space: spaces.Space, horizon: int, samples: int, iterations: int, seed: int) -> int:
    """:return: in how many draws the planner chooses the vault's first action; Box: to 0.25 in each dimension"""
    codec = make_action_codec(space, math.log(0.9))  # tanh of such a Gaussian is nearly uniform
    model, generator = Vault(codec), th.Generator().manual_seed(seed)
    config = PlannerConfig(n_samples=samples, horizon=horizon, n_iterations=iterations)
    start = th.tensor([[0.0, 1.0]]).repeat(DRAWS, 1)
    chosen = plan(model, codec, start, GAMMA, config, lambda steps, n: codec.noise((steps, DRAWS, n), generator)).mode()
    return int(((chosen - model.code[0]).abs().amax(-1) < 0.25).sum())


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256, help="action sequences per iteration")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    verdicts = Verdicts(f"Planner, {args.samples} sequences x {args.iterations}, {DRAWS} draws, seed {args.seed}")
    for space in SPACES:
        three, two = (found(space, horizon, args.samples, args.iterations, args.seed) for horizon in (3, 2))
        text = f"{three} of {DRAWS} with 3 steps (at least {ENOUGH}), {two} with 2 (at most {DRAWS - ENOUGH})"
        verdicts.judge(three >= ENOUGH and two <= DRAWS - ENOUGH, f"{space}: optimum found in {text}")
    verdicts.exit()


if __name__ == "__main__":
    main()
