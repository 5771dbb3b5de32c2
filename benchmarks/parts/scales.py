"""
The unit of the rewards means nothing: with another one, everything that is learned comes out the same, to the bit.

One seed, three trainings with the defaults, on rewards times 1, 2**10 and 2**-10. Only the return scales may differ, and
they must do so by just that factor. (Powers of two: other factors round.)

``python -m benchmarks.parts.scales``
"""

from benchmarks.envs import vec_env
from benchmarks.parts.common import Verdicts, differing, learned, training_arguments
from sb3_m3po import M3PO

FACTORS = (2.0**10, 2.0**-10)
SCALES = ("return_scale", "bar_scale")


def learn(env_id: str, factor: float, steps: int, seed: int) -> M3PO:
    """
    :param env_id: see :func:`~benchmarks.envs.make_env`
    :param factor: on the rewards
    :param steps: environment steps
    :param seed: of the training
    :return: what was trained
    """
    return M3PO("MlpPolicy", vec_env(env_id, 1, seed, factor), seed=seed, device="cpu").learn(steps)


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    args = training_arguments(__doc__, steps=1_500).parse_args(argv)
    verdicts = Verdicts(f"Units of reward, {args.env}, {args.steps} steps, seed {args.seed}")
    plain = learn(args.env, 1.0, args.steps, args.seed)
    expected = learned(plain)
    verdicts.judge(plain._n_updates > 0, f"{plain._n_updates} updates, return scale {plain.policy.return_scale.item():.6g}")
    for factor in FACTORS:
        scaled = learn(args.env, factor, args.steps, args.seed)
        found = learned(scaled)
        wrong = [name for name in differing(expected, found) if name not in SCALES]
        wrong += [name for name in SCALES if not found[name].equal(factor * expected[name])]
        text = f"wrong: {len(wrong)} of {len(expected)} tensors {wrong[:3] or ''}".rstrip()
        same = not wrong and scaled._n_updates == plain._n_updates
        verdicts.judge(same, f"rewards x {factor:g}: {text}, return scale {scaled.policy.return_scale.item():.6g}")
    verdicts.exit()


if __name__ == "__main__":
    main()
