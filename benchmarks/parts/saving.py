"""
A saved model goes on as if nothing had happened: the next ``train()`` is equal to the bit, in what it learns and logs.

Out of the zip and the file of the replay memory. The random generators are in neither, and are handed over here.

``python -m benchmarks.parts.saving``
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from stable_baselines3.common.logger import Logger

from benchmarks.envs import vec_env
from benchmarks.parts.common import Verdicts, differing, learned, training_arguments
from sb3_m3po import M3PO


def copy_through_files(model: M3PO, env_id: str) -> tuple[M3PO, str]:
    """
    :param model: what is saved
    :param env_id: its environment
    :return: what was loaded, with the generators of ``model``; and the sizes of the files
    """
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("model.zip", "memory.pkl")]
        model.save(files[0])
        model.save_replay_buffer(files[1])
        loaded = M3PO.load(files[0], env=vec_env(env_id, 1, 0), device="cpu")
        loaded.load_replay_buffer(files[1], truncate_last_traj=False)
        sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.2f} MB" for path in files)
    loaded._generator.set_state(model._generator.get_state())
    loaded._rng.bit_generator.state = model._rng.bit_generator.state
    return loaded, sizes


def train_once(model: M3PO) -> dict[str, float]:
    """:return: what one call of ``train()`` with updates logs, without what it says of the rollout, which is not saved"""
    model.set_logger(Logger(folder=None, output_formats=[]))
    model._update_credits += model.sync_interval
    model.train()
    logged = dict(model.logger.name_to_value)
    logged.pop("train/explained_variance")
    return logged


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    args = training_arguments(__doc__, steps=1_500).parse_args(argv)
    verdicts = Verdicts(f"Saving and loading, {args.env}, {args.steps} steps, seed {args.seed}")
    model = M3PO("MlpPolicy", vec_env(args.env, 1, args.seed), seed=args.seed, device="cpu").learn(args.steps)
    loaded, sizes = copy_through_files(model, args.env)
    before = learned(model)
    wrong = differing(before, learned(loaded))
    verdicts.judge(not wrong, f"loaded ({sizes}): {len(wrong)} of {len(before)} tensors differ {wrong[:3] or ''}".rstrip())
    first, second = train_once(model), train_once(loaded)
    after = learned(model)
    moved, wrong = differing(before, after), differing(after, learned(loaded))
    text = f"next train(): {len(wrong)} of {len(after)} tensors differ {wrong[:3] or ''}".rstrip()
    verdicts.judge(bool(moved) and not wrong, f"{text}; it changed {len(moved)}")
    unequal = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    text = f"next train(): {len(unequal)} of {len(first)} logged values differ {unequal[:3] or ''}".rstrip()
    verdicts.judge(not unequal, text)
    verdicts.exit()


if __name__ == "__main__":
    main()
