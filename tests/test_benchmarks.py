"""The benchmark harness: rows, resuming, overrides, the verdict of the table; and that every script runs."""

import csv
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO, SAC

from benchmarks import record, scaling, speed, study_plots, table
from benchmarks import run as benchmark
from benchmarks.algorithms import Settings, apply_overrides
from benchmarks.parts import critic, planner, saving, scales, trust_region, world_model
from benchmarks.random_baseline import lag_correlation
from benchmarks.record import RESULTS, Clock, read_rows, reference_ms, write_rows
from benchmarks.run import Run
from benchmarks.table import passes, score
from benchmarks.targets import Target
from tests.helpers import Hasty

TARGET = Target("CartPole-v1", bar=100.0, within=3, until=5)


def arguments(tmp_path, steps: int) -> list[str]:
    """The command line of a short run."""
    options = ["--algo", "ppo", "--env", "CartPole-v1", "--seeds", "0", "-p", "n_steps:64", "-p", "n_epochs:1"]
    return [
        *options,
        "--steps",
        str(steps),
        "--name",
        "test",
        "--out",
        str(tmp_path),
        "--checkpoints",
        str(tmp_path / "saved"),
    ]


def test_run_resumes_from_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ppo-test" / "CartPole-v1_seed0.csv"
    monkeypatch.setattr(benchmark.Evaluate, "_checkpoint", lambda self, steps: save_and_die(self, steps, at=2000))
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(arguments(tmp_path, 3000))
    with path.open("a") as file:
        file.write("ppo,test,CartPole-v1,0,2500,1.0,0.0,20,1,1,1,1,1,a,b,c\nppo,te")
    monkeypatch.undo()
    benchmark.main(arguments(tmp_path, 3000))
    rows = read_rows(path)
    assert [int(row["steps"]) for row in rows] == [1000, 2000, 3000]
    assert all(set(row) == set(benchmark.COLUMNS) and float(row["reference_ms"]) > 0 for row in rows)
    times = [float(row["cpu_seconds"]) for row in rows]
    assert times == sorted(times)
    content = path.read_text()
    benchmark.main(arguments(tmp_path, 3000))
    assert path.read_text() == content, "a finished run is left alone"


def test_a_checkpoint_without_its_rows_is_not_resumed(tmp_path, monkeypatch):
    """Rows are in version control, checkpoints are not."""
    path = tmp_path / "ppo-test" / "CartPole-v1_seed0.csv"
    monkeypatch.setattr(benchmark.Evaluate, "_checkpoint", lambda self, steps: save_and_die(self, steps, at=2000))
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(arguments(tmp_path, 3000))
    monkeypatch.undo()
    path.unlink()
    benchmark.main(arguments(tmp_path, 3000))
    assert [int(row["steps"]) for row in read_rows(path)] == [1000, 2000, 3000]
    assert benchmark.is_done(arguments(tmp_path, 3000)) and not benchmark.is_done(arguments(tmp_path, 4000))


def test_a_set_of_tasks_is_done_with_the_last_row_of_each(tmp_path):
    run = Run("m3po", "t", "mt10", 0, 2000, Settings(), "", out=tmp_path)
    rows = [dict.fromkeys(run.columns, "0") | {"task": task, "steps": n} for n in (1000, 2000) for task in "ab"]
    for n, done in ((4, True), (3, False), (2, False)):
        write_rows(run.csv_path("t"), rows[:n], run.columns)
        assert run.done() is done


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_resumed_training_never_sees_what_it_is_evaluated_on(seed, tmp_path):
    """At 100,000 steps, say, from which the seed of the evaluations is made."""
    run = Run("ppo", "t", "CartPole-v1", seed, 200_000, Settings(kwargs={"n_steps": 8}), "", checkpoints=tmp_path)
    model = benchmark.build(run, None, 0)
    benchmark.save_checkpoint(model, run, {"steps": 100_000, "wall": 0, "cpu": 0})
    resumed = benchmark.build(run, run.checkpoint_dir / "step100000", 100_000)
    seen = resumed.env.reset()
    eval_env = benchmark.evaluation_env(run, resumed)
    for evaluated in range(3):
        eval_env.seed(benchmark.EVALUATION_SEED + 1_000 * evaluated)
        assert not (eval_env.reset() == seen).all(-1).any()


def test_run_of_an_algorithm_in_a_module(tmp_path):
    options = ["--algo", "stable_baselines3:PPO", *arguments(tmp_path, 1000)[2:], "--matmul", "medium"]
    benchmark.main(options)
    precision = th.get_float32_matmul_precision()
    th.set_float32_matmul_precision("highest")
    (row,) = read_rows(tmp_path / "PPO-test" / "CartPole-v1_seed0.csv")
    assert row["algo"] == "PPO" and "--algo stable_baselines3:PPO" in row["command"] and "--matmul medium" in row["command"]
    assert precision == "medium"


def save_and_die(callback, steps: int, at: int) -> None:
    """Write a checkpoint, then stop as Ctrl-C does."""
    if steps == at:
        state = {"steps": steps, "wall": callback.clock.wall, "cpu": callback.clock.cpu}
        benchmark.save_checkpoint(callback.model, callback.run, state)
        raise KeyboardInterrupt


def test_overrides_reach_nested_arguments_and_leave_the_original():
    before = {"policy_kwargs": {"n_critics": 5}}
    after = apply_overrides(before, ["policy_kwargs.n_critics:2", "learning_rate:1e-3", "ent_coef:auto"])
    assert after == {"policy_kwargs": {"n_critics": 2}, "learning_rate": 1e-3, "ent_coef": "auto"}
    assert before == {"policy_kwargs": {"n_critics": 5}}
    schedule = apply_overrides({}, ["learning_rate:lin_1e-3"])["learning_rate"]
    assert [schedule(1.0), schedule(0.0)] == [1e-3, 0.0]


@pytest.mark.parametrize(
    "scores, verdict",
    [
        ([[100, 100, 100, 100, 100], [100, 100, 100, 100, 100]], True),
        ([[90, 90, 90, 100, 100], [110, 110, 110, 100, 100]], True),
        ([[60, 60, 60, 100, 100], [150, 150, 150, 100, 100]], False),  # a seed below 0.8
        ([[100, 100, 100, 100, 90], [100, 100, 100, 100, 100]], False),  # it does not stay there
        ([[100, 100, 100, 100, 100]], False),  # a seed is missing
    ],
)
def test_table_asks_for_the_mean_the_worst_seed_and_what_comes_later(scores, verdict):
    curves = {seed: {step + 1: (float(value), 0.0) for step, value in enumerate(values)} for seed, values in enumerate(scores)}
    result = score(curves, TARGET)
    assert result is not None
    assert passes(result, TARGET, random=0.0, share=1.0, n_seeds=2) == verdict


def test_readme_has_the_table_of_the_committed_results(capsys):
    table.main([])
    assert capsys.readouterr().out in Path("README.md").read_text()


def test_docs_have_the_tables_of_the_committed_variants(capsys):
    docs = Path("docs/benchmarks.md").read_text()
    for options in (["--variant", "policy"], ["--variant", "hybrid", "--share", "0.9", "--seeds", "1"]):
        table.main(options)
        assert capsys.readouterr().out in docs
    for variant in ("rewards=1000", "rewards=0.001"):
        table.main(["--variant", variant])
        rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| CartPole")]
        assert rows and all(row in docs for row in rows)


def test_docs_have_the_committed_times() -> None:
    docs = Path("docs/benchmarks.md").read_text()
    for row in csv.DictReader((RESULTS / "scaling.csv").open()):
        assert f"| {' | '.join([row[column] for column in scaling.COLUMNS[:-2]])} |" in docs
    tables: dict[tuple[str, str, str], list[str]] = {}
    for name in ("speed.csv", "speed-medium.csv", "speed-xeon.csv", "speed-xeon-medium.csv"):
        for row in csv.DictReader((RESULTS / name).open()):
            tables.setdefault((name, row["measure"], row["case"]), []).append(row["value"])
    assert tables and all(f"| {case} | {' | '.join(values)} |" in docs for (_, _, case), values in tables.items())


def test_evidence_page_has_means_of_the_committed_rows():
    runs: dict[tuple[str, ...], list[tuple[int, float, float]]] = {}
    for path in [*Path("benchmarks/studies").glob("*.csv"), *RESULTS.glob("m3po-*/*.csv")]:
        for row in csv.DictReader(path.open()):
            if "steps" in row and "task" not in row:
                # The first column of a study says what differed
                key = (
                    path.name,
                    next(iter(row.values())),
                    *(row[name] for name in ("variant", "env", "seed", "command", "commit")),
                )
                runs.setdefault(key, []).append((int(row["steps"]), float(row["mean_reward"]), float(row["cpu_seconds"])))
    # Of the last three evaluations, ten, or all of them
    means = [np.mean([score for _, score, _ in sorted(rows)[-last:]]) for rows in runs.values() for last in (3, 10, 0)]
    known = {f"{abs(number):,.0f}" for number in [*means, *(max(rows)[2] for rows in runs.values())]}

    page = re.sub(r".*\n(?=\| ---)", "", Path("docs/ablations.md").read_text())  # without the tables' heads
    cells = [cell for line in page.splitlines() if line.startswith("| ") for cell in line.split("|")[2:-1]]
    # A run that was stopped, or seen before its end, is marked by "until"
    told = [number for cell in cells for number in re.findall(r"\d[\d,]*\d", re.sub(r"[\d,]+ until [\d,]+|\(.*\)", "", cell))]
    assert len(told) > 40
    assert [number for number in told if number not in known] == []


def test_lag_correlation_of_a_known_process():
    rng = np.random.default_rng(0)
    x = np.zeros((20_000, 3))
    for t in range(1, len(x)):
        x[t, 0], x[t, 1] = 0.9 * x[t - 1, 0] + rng.normal(), rng.normal()  # 0.9 and 0; the third stands still
    assert lag_correlation([x[:10_000], x[10_000:]]) == pytest.approx(0.45, abs=0.02)


# ---------------------------------------------- the scripts, with small networks and budgets: that they run


@pytest.mark.parametrize(
    "part, options, lines, passed",
    [
        (scales, ["--steps", "256"], ["rewards x 1024: wrong: 0", "rewards x 0.000976562: wrong: 0"], True),
        (saving, ["--steps", "256"], ["next train(): 0 of"], True),
        (planner, ["--samples", "256"], ["Discrete(", "Box(", "MultiDiscrete(", "MultiBinary("], True),
        (world_model, ["--steps", "256"], ["3-step rewards", "3-step latents", "planning with it"], None),
        (critic, [], ["rewards 1 and 2", "rewards 0 or 20", "pass: bonus of a new model", "pass: bonus by hand"], None),
    ],
    ids=["scales", "saving", "planner", "world_model", "critic"],
)
def test_parts(part, options, lines, passed, monkeypatch, capsys):
    if hasattr(part, "M3PO"):
        monkeypatch.setattr(part, "M3PO", Hasty)
    monkeypatch.setattr(critic, "ACTIONS", critic.ACTIONS[:1])
    with pytest.raises(SystemExit) as end:
        part.main(options)
    output = capsys.readouterr().out
    assert all(line in output for line in lines), output
    assert passed is None or (end.value.code == 0) == passed
    if part is world_model:
        initial, trained = re.search(r"\((\S+) without its noise\).* trained (\S+):", output).groups()
        assert initial != trained, "what predicts is the initial policy again"


def test_trust_region_part(monkeypatch, capsys):
    monkeypatch.setattr(trust_region, "Recorded", type("Recorded", (trust_region.Recorded, Hasty), {}))
    with pytest.raises(SystemExit):
        trust_region.main(["--env", "Pendulum-v1", "--steps", "512"])
    with_it, without_it = capsys.readouterr().out.splitlines()[1:]
    assert "seed 0, with it: mean KL of 4 syncs" in with_it and "seed 0, without it: mean KL of 4 syncs" in without_it


def test_speed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(speed, "M3PO", Hasty)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "FULL", 2_000)
    monkeypatch.setattr(speed, "time_calls", partial(speed.time_calls, seconds=0.01))
    speed.main(["--steps", "256", "--csv", str(tmp_path / "speed.csv")])
    rows = read_rows(tmp_path / "speed.csv")
    cases = list(dict.fromkeys((row["measure"], row["case"]) for row in rows))
    assert cases == [
        *(("update", "M3PO"), ("update", "SAC")),
        *(("training", name) for name in ("M3PO", "M3PO, collecting by the policy", "SAC")),
        *(("predict", "M3PO"), ("predict", "PPO")),
        *(("planned step of environments", n) for n in ("1", "8", "64")),
    ]
    printed = capsys.readouterr().out
    assert all(row["value"] in printed and row["commit"] and row["command"] for row in rows)
    rates = [float(row["value"].split(" ")[0]) for row in rows if row["measure"] == "training"]
    assert len(rates) == 6 and min(rates) > 0


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_study_is_read_from_its_table_and_drawn(tmp_path, capsys):
    rows = (Path(study_plots.__file__).parent / "studies" / "pendulum-2000.csv").read_text().splitlines()
    (tmp_path / "study.csv").write_text("\n".join(rows[:7]))
    study_plots.main([str(tmp_path / "study.csv"), "--out", str(tmp_path)])
    assert "6 trials, the best is number 4" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"study-history.png", "study-importances.png"}


def test_when_runs_are_evaluated(tmp_path):
    def times(steps: int, env_id: str = "Pendulum-v1") -> list[int]:
        run = Run("m3po", "x", env_id, 0, steps, Settings(), "", out=tmp_path)
        found = [run.next_evaluation(0)]
        while found[-1] < steps:
            # Some environments at a time come to a little more
            found.append(run.next_evaluation(found[-1] + 3))
        planned.append([when for when in found if run.evaluates_plans(when)])
        return found

    planned: list[list[int]] = []
    often = [*range(1_000, 20_001, 1_000), *range(22_500, 50_001, 2_500), *range(55_000, 100_001, 5_000)]
    assert times(100_000) == often
    assert times(8_000) == list(range(1_000, 8_001, 1_000))
    assert times(60_000) == list(range(3_000, 60_001, 3_000))
    # One task is compared with an environment of its own, a set of them with nothing else
    assert times(100_000, "dm-family:walker-run-v0") == often
    assert times(100_000, "dm-family:-walker-run-v0") == list(range(5_000, 100_001, 5_000))
    assert times(200_000) == [*often, *range(110_000, 200_001, 10_000)]
    # An agent with a larger budget is looked at as often up to 100,000; then three evaluations make a mean
    late = [when + before for when in range(150_000, 1_000_001, 50_000) for before in (-10_000, -5_000, 0)]
    assert times(1_000_000) == [*often, *late]
    assert planned[0] == [25_000, 50_000, 75_000, 90_000, 95_000, 100_000]
    assert planned[6][:3] == [250_000, 500_000, 750_000] and planned[6][-3:] == late[-3:]


def test_a_fixed_piece_of_work_takes_some_time_and_draws_nothing() -> None:
    before = th.get_rng_state()
    with th.no_grad():
        first, second = reference_ms(), reference_ms()
    assert 0 < first < 10 * second < 100 * first and th.get_rng_state().equal(before)


def test_commits_train_alike_unless_their_sources_differ(monkeypatch) -> None:
    said = {"cat-file": "", "diff": None}
    monkeypatch.setattr(record, "_git", lambda command, *_: said[command])
    assert record.train_alike("a", "a") and record.train_alike("a+", "a+") and not record.train_alike("a", "b")
    assert not record.train_alike("a+", "a") and not record.train_alike("a", "b+"), "nobody knows what was changed"
    said["diff"] = ""
    assert record.train_alike("a", "b")
    said |= {"cat-file": None, "diff": None}
    assert record.train_alike("a", "b"), "the commits are not here"


def test_a_checkpoint_of_other_code_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark.Evaluate, "_checkpoint", lambda self, steps: save_and_die(self, steps, at=2000))
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(arguments(tmp_path, 3000))
    monkeypatch.undo()
    monkeypatch.setattr(benchmark, "train_alike", lambda before, now: False)
    with pytest.raises(RuntimeError, match=r"trains otherwise: check out .* to go on, or delete .*CartPole-v1_seed0 to begin"):
        benchmark.main(arguments(tmp_path, 3000))
    assert len(read_rows(tmp_path / "ppo-test" / "CartPole-v1_seed0.csv")) == 2, "the rows are still there"


def test_a_run_that_begins_has_no_final_model(tmp_path, monkeypatch) -> None:
    final = tmp_path / "saved" / "ppo-test" / "CartPole-v1_seed0" / "final.zip"
    final.parent.mkdir(parents=True)
    final.touch()
    monkeypatch.setattr(benchmark, "build", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(arguments(tmp_path, 1000))
    assert not final.exists()


@pytest.mark.parametrize(("algo", "saved"), [("ppo", False), ("sac", True)])
def test_what_has_no_memory_is_not_saved_in_the_middle_of_a_rollout(algo, saved, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "save_checkpoint", lambda model, run, state: states.append(state["steps"]))
    states: list[float] = []
    model = {"ppo": PPO, "sac": SAC}[algo]("MlpPolicy", "Pendulum-v1", device="cpu")
    run = Run(algo, "x", "Pendulum-v1", 0, 2000, Settings(), "", out=tmp_path)
    callback = benchmark.Evaluate(run, model.get_env(), Clock(wall=100.0))
    callback.model = model
    callback._checkpoint(1000)
    assert states == ([1000] if saved else [])
