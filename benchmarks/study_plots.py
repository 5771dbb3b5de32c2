"""
Draw how a study of hyperparameters went and which of them mattered, by Optuna's own plots, from the table of its trials.

``python -m benchmarks.study_plots benchmarks/studies/pendulum-2000.csv --out docs/images``
"""

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import optuna
import pandas as pd
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial
from optuna.visualization.matplotlib import plot_optimization_history, plot_param_importances

from sb3_m3po.zoo import sample_m3po_params


def read_study(table: Path) -> optuna.Study:
    """
    :param table: CSV of ``study.trials_dataframe()``, which says nothing of the ranges: they are those of the search space
    :return: the study
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=table.stem, direction="maximize")
    study.add_trials([_trial(row) for _, row in pd.read_csv(table).iterrows()])
    return study


def _trial(row: pd.Series) -> FrozenTrial:
    prefix = "params_"
    params = {str(name)[len(prefix) :]: value for name, value in row.items() if str(name).startswith(prefix)}
    drawn = FixedTrial(params)
    sample_m3po_params(drawn, n_actions=1, n_envs=1, additional_args={})
    value = row["value"] if row["state"] == "COMPLETE" else None
    return create_trial(state=TrialState[row["state"]], params=params, distributions=drawn.distributions, value=value)


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV of the trials")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the pictures")
    args = parser.parse_args(argv)
    matplotlib.use("Agg")
    study = read_study(args.table)
    print(f"{len(study.trials)} trials, the best is number {study.best_trial.number}: {study.best_value:.1f}")
    for name, plot in (("history", plot_optimization_history), ("importances", plot_param_importances)):
        plot(study)
        args.out.mkdir(parents=True, exist_ok=True)
        plt.savefig(args.out / f"{args.table.stem}-{name}.png", dpi=80, bbox_inches="tight")
        plt.close()


if __name__ == "__main__":
    main()
