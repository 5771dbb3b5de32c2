"""
One change at a time on four environments of different kinds: what each default is worth.

``python -m benchmarks.ablations --jobs 2`` runs what is missing, then prints the tables and draws the figures of all there is;
``--only trust_region planner`` does so for some parts, ``--dry-run`` without running anything.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.curves import Results
from benchmarks.record import RESULTS
from benchmarks.run import is_done, run_commands
from benchmarks.suites import core_hours

#: Dense and continuous, discrete, slow to start, sparse
ENV_IDS = ("HalfCheetah-v5", "LunarLander-v3", "dm_control/walker-walk-v0", "dm_control/cartpole-swingup_sparse-v0")
#: Environment steps (frames); in its first 25,000 frames the sparse one has nothing to learn from
STEPS = {env_id: 50_000 if env_id.endswith("sparse-v0") else 30_000 for env_id in ENV_IDS}
IMAGES = Path("docs/images")
#: Part -> what is changed -> the options that change it; the defaults have none
PARTS: dict[str, dict[str, list[str]]] = {
    "trust_region": {
        f"{kl or 'none'}, {period}": ["-p", f"target_kl:{kl}", "-p", f"sync_interval:{period}"]
        for kl in (0.1, 0.3, 1.0, None)
        for period in (128, 256)
    },
    "planner": {
        "none": ["-p", "plan_rollouts:False"],
        "half": ["-p", "plan_rollouts:0.5"],
        "collect": ["-p", "plan_rollouts:True"],
        "predict": ["-p", "plan_rollouts:False"],
        "both": ["-p", "plan_rollouts:True"],
    },
    # Without it neither planner nor policy can look ahead: between, a model that only shapes the latent
    "world_model": {
        "on": [],
        "latent only": ["--algo", "benchmarks.ablated:CriticsAlone", "-p", "plan_rollouts:False"],
        "off": ["--algo", "benchmarks.ablated:ModelFree"],
    },
    # Of the policy: the critics' value everywhere, or in half of the states, and a step of the model in the others
    "gain": {"half": [], "critics": ["--algo", "benchmarks.ablated:CriticsAlone"]},
    "target_entropy": {
        "falling": [],
        "constant": ["--algo", "benchmarks.ablated:ConstantEntropy"],
        "late": ["--algo", "benchmarks.ablated:LateEntropy"],
    },
    "policy_delay": {"2": [], "1": ["--algo", "benchmarks.ablated:Undelayed"]},
    "averaging": {"mean": [], "last": ["--algo", "benchmarks.ablated:LastNetworks"]},
    "pessimism": {str(x): ["-p", f"policy_kwargs.pessimism:{x}"] for x in (0.0, 0.5, 1.0)},
    "critics": {str(n): ["-p", f"policy_kwargs.n_critics:{n}"] for n in (2, 5, 10)},
    # Hidden layers of each critic
    "critic_layers": {"256 256": [], "128": ["-p", "policy_kwargs.net_arch:dict(pi=[256,256],vf=[128])"]},
    "bonus": {str(coef): ["-p", f"bonus_coef:{coef}"] for coef in (0.0, 0.1, 0.3)},
    "utd": {str(ratio): ["-p", f"utd_ratio:{ratio}"] for ratio in (0.125, 0.25, 0.5, 1.0)},
    # As many samples visited, in fewer and larger updates
    "batch": {
        "128 at 1": [],
        **{f"{n} at {128 / n:g}": ["-p", f"batch_size:{n}", "-p", f"utd_ratio:{128 / n:g}"] for n in (256, 512)},
    },
    "envs": {str(n): ["--n-envs", str(n)] for n in (1, 16, 256)},
    "gamma": {"auto": [], **{str(gamma): ["-p", f"gamma:{gamma}"] for gamma in (0.99, 0.995)}},
    "learning_rate": {"0.002 to 0.0002": [], **{str(rate): ["-p", f"learning_rate:{rate}"] for rate in (0.001, 0.002, 0.004)}},
}
#: Parts that change nothing where actions are enumerated: there, all values have the runs of the default
SAMPLED_ONLY, ENUMERATED = ("target_entropy",), "LunarLander-v3"
#: Values that are the planner's evaluations in the runs of another value
PLANNED = {"predict": "none", "both": "collect"}
#: What of these are the defaults; where actions are enumerated half of the episodes are planned
DEFAULTS = {
    "trust_region": "1.0, 128",
    "planner": "collect",
    "world_model": "on",
    "gain": "half",
    "target_entropy": "falling",
    "policy_delay": "2",
    "averaging": "mean",
    "pessimism": "1.0",
    "critics": "2",
    "critic_layers": "256 256",
    "bonus": "0.0",
    "utd": "1.0",
    "batch": "128 at 1",
    "envs": "1",
    "gamma": "auto",
    "learning_rate": "0.002 to 0.0002",
}


def default(part: str, env_id: str) -> str:
    """
    :param part: a key of ``PARTS``
    :param env_id: an environment
    :return: which of its values is the default there
    """
    return "half" if part == "planner" and env_id == ENUMERATED else DEFAULTS[part]


def variant(part: str, value: str, env_id: str) -> str:
    """
    :param part: a key of ``PARTS``
    :param value: one of its values
    :param env_id: an environment
    :return: what the settings are called in the results
    """
    if value in PLANNED:
        return f"{variant(part, PLANNED[value], env_id)},planned"
    if default(part, env_id) == value or (part in SAMPLED_ONLY and env_id == ENUMERATED):
        return "ablation"
    return f"ablation,{part}={value.replace(', ', '-').replace(' ', '-')}"


def label(part: str, value: str, env_id: str) -> str:
    """
    :param part: a key of ``PARTS``
    :param value: one of its values
    :param env_id: an environment
    :return: what the folder of its results is called
    """
    name, options = variant(part, value, env_id), PARTS[part][value]
    changed = "--algo" in options and name != "ablation"
    return f"{options[options.index('--algo') + 1].rpartition(':')[-1] if changed else 'm3po'}-{name}"


def commands(parts: list[str], seeds: list[int], matmul: str) -> list[tuple[str, list[str]]]:
    """
    :param parts: keys of ``PARTS``
    :param seeds: seeds of each run
    :param matmul: precision of products
    :return: environment and arguments of ``python -m`` of each run; the defaults once
    """
    found: dict[tuple[str, str, int], list[str]] = {}
    for part in parts:
        for value, options in PARTS[part].items():
            if value in PLANNED:
                continue
            for env_id in ENV_IDS:
                name = variant(part, value, env_id)
                # All runs of the planner's part are evaluated with it too, and so are the defaults, whatever they are run for
                planned = ["--eval-planning", "32", "1"] if part == "planner" or name == "ablation" else []
                for seed in seeds:
                    run = ["benchmarks.run", "--env", env_id, "--steps", str(STEPS[env_id]), "--seeds", str(seed)]
                    run += ["--name", name]
                    run += ["--matmul", matmul] if matmul != "highest" else []
                    found[name, env_id, seed] = run + (options if name != "ablation" else []) + planned
    return [(env_id, command) for (_, env_id, _), command in found.items()]


def hours(env_id: str, command: list[str]) -> float:
    """
    :param env_id: an environment
    :param command: arguments of ``python -m``
    :return: roughly how long the run takes
    """
    ratios = [float(option.removeprefix("utd_ratio:")) for option in command if option.startswith("utd_ratio:")]
    return core_hours("m3po", env_id, STEPS[env_id]) * (ratios[0] if ratios else 1.0)


class Found(NamedTuple):
    """
    What came of a value. A planned evaluation is done at a few steps only, which the mean over the way is of then.

    :param scores: the last one of each seed and environment, normalised, shape ``(n_seeds, n_environments)``
    :param on_the_way: the mean over all steps of the budget, over seeds and environments
    :param minutes: CPU-minutes of training, over seeds and environments
    """

    scores: np.ndarray
    on_the_way: float
    minutes: float


def gather(folder: Path, part: str) -> dict[str, Found]:
    """
    :param folder: where the CSV files are
    :param part: a key of ``PARTS``
    :return: what came of each value; those without runs in all environments are left out
    """
    found = {}
    for value in PARTS[part]:
        curves = [Results(folder, STEPS[env_id]).curve(label(part, value, env_id), env_id) for env_id in ENV_IDS]
        whole = [curve for curve in curves if curve is not None]
        if len(whole) == len(ENV_IDS):
            n_seeds = min(len(curve.scores) for curve in whole)
            on_the_way = [
                np.interp(np.linspace(0, c.centres[-1], 1_000), np.append(0, c.centres), np.append(0, c.mean)).mean()
                for c in whole
            ]
            minutes = np.mean([curve.cpu_seconds[:, -1].mean() for curve in whole]) / 60
            last = np.stack([curve.scores[:n_seeds, -1] for curve in whole], 1)
            found[value] = Found(last, float(np.mean(on_the_way)), float(minutes))
    return found


def table(part: str, found: dict[str, Found]) -> str:
    """
    :param part: a key of ``PARTS``
    :param found: what came of its values
    :return: a table of markdown
    """
    names = [env_id.removeprefix("dm_control/") for env_id in ENV_IDS]
    columns = [part, "seeds", *names, "mean", "of the best", "mean on the way", "CPU-min"]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    best = max(value.scores.mean() for value in found.values())
    for name, (scores, on_the_way, minutes) in found.items():
        cells = [f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in _spread(scores)]
        mean, star = scores.mean(), " (default)" if DEFAULTS[part] == name else ""
        cells += [f"{mean:.3f}", f"{mean / best:.0%}", f"{on_the_way:.3f}", f"{minutes:.0f}"]
        lines.append(f"| {name}{star} | {len(scores)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(part_scores: np.ndarray) -> list[tuple[float, float, float]]:
    """Mean, lowest and highest seed of each environment."""
    return list(zip(part_scores.mean(0), part_scores.min(0), part_scores.max(0), strict=True))


def figure(part: str, found: dict[str, Found], path: Path) -> None:
    """
    Draw the scores of a part, one panel for each environment, a point for each seed.

    :param part: a key of ``PARTS``
    :param found: what came of its values
    :param path: of the picture
    """
    picture, axes = plt.subplots(1, len(ENV_IDS), figsize=(13, 2.8), layout="constrained")
    for i, (axis, env_id) in enumerate(zip(axes, ENV_IDS, strict=True)):
        axis.bar(list(found), [value.scores[:, i].mean() for value in found.values()], color="lightsteelblue")
        for x, value in enumerate(found.values()):
            axis.plot([x] * len(value.scores), value.scores[:, i], "k.", alpha=0.6)
        axis.set_title(env_id.removeprefix("dm_control/"))
        axis.tick_params("x", rotation=45)
    axes[0].set_ylabel("score at the end")
    picture.savefig(path, dpi=70)
    plt.close(picture)


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process with one thread")
    parser.add_argument("--matmul", default="highest", choices=["highest", "high", "medium"], help="precision of products")
    parser.add_argument("--dry-run", action="store_true", help="only print and draw what there is")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=IMAGES)
    args = parser.parse_args(argv)
    runs = [(env_id, [*run, "--out", str(args.results)]) for env_id, run in commands(args.only, args.seeds, args.matmul)]
    missing = [(env_id, run) for env_id, run in runs if not is_done(run[1:])]
    total = sum(hours(*run) for run in missing)
    print(f"{len(missing)} runs, about {total:.1f} core-hours of training ({len(runs) - len(missing)} are done)", flush=True)
    failed = 0 if args.dry_run else run_commands([run for _, run in missing], args.jobs)
    matplotlib.use("Agg")
    for part in args.only:
        if found := gather(args.results, part):
            print("\n" + table(part, found))
            args.images.mkdir(parents=True, exist_ok=True)
            figure(part, found, args.images / f"ablation-{part.replace('_', '-')}.png")
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
