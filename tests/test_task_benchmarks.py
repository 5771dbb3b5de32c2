"""The benchmarks over sets of tasks: rows, tasks that a model takes in, and what the tables make of them."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from benchmarks import run as benchmark
from benchmarks import speed, task_sets, task_table
from benchmarks.record import read_rows, stem, write_rows
from benchmarks.run import TASK_COLUMNS
from benchmarks.targets import LEARNED
from benchmarks.task_sets import name_of, task_vec_env, tasks_of
from benchmarks.task_table import Curve, load
from sb3_m3po import M3PO, Task
from tests.helpers import Hasty, RandomEnv


def a_task(name: str, width: int) -> Task:
    box = spaces.Box(-1.0, 1.0, (width,), np.float32)
    return Task(RandomEnv, name, env_kwargs=dict(observation_space=box, action_space=box))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of three small tasks, and an algorithm that learns it at once."""
    tasks = [a_task("a", 2), a_task("b", 4), a_task("c", 3)]
    monkeypatch.setitem(task_sets.TASK_SETS, "small", lambda: tasks)
    monkeypatch.setattr(benchmark, "algorithm_class", lambda name: Hasty)


def run(tmp_path: Path, env_id: str, *options: str, steps: int = 2_000) -> list[dict[str, str]]:
    """:return: The rows of a short run"""
    folders = ["--out", str(tmp_path), "--checkpoints", str(tmp_path / "saved")]
    folders += ["-p", "utd_ratio:0.05"] if "--grown-from" not in options else []
    benchmark.main(["--env", env_id, "--steps", str(steps), "--seeds", "0", "--name", "t", *folders, *options])
    grown = [word for word in options if word in ("all", "new")]
    label = f"m3po-t,grown-{grown[0]}" if grown else "m3po-t"
    return read_rows(tmp_path / label / f"{stem(env_id, 0)}.csv")


def test_steps_are_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = [replace(task, action_repeat=2) for task in tasks_of("small")]
    monkeypatch.setitem(task_sets.TASK_SETS, "small", lambda: twice)
    rows = run(tmp_path, "small")
    assert [int(row["steps"]) for row in rows[::3]] == [1_002, 2_004]


def test_parts_of_a_set() -> None:
    names = {env_id: [name_of(task) for task in tasks_of(env_id)] for env_id in ("small", "small:b", "small:-b")}
    assert names == {"small": ["a", "b", "c"], "small:b": ["b"], "small:-b": ["a", "c"]}
    for env_id in ("small:d", "small:-d"):
        with pytest.raises(ValueError, match="a, b, c"):
            tasks_of(env_id)
    # Without its widest task there is room for it
    without = task_vec_env("small:-b", 1, 0)
    assert without.action_space.shape == (4,) and without.observation_space["observation"].shape == (4,)  # type: ignore[index]
    assert task_vec_env("small:a", 1, 0).action_space.shape == (2,)


@pytest.mark.parametrize("name", ["dm-mix", "dm-family", "discrete-mix", "three"])
def test_the_real_sets_can_be_made(name: str) -> None:
    pytest.importorskip("dm_control")
    pytest.importorskip("minigrid")
    env = task_vec_env(name, 1, 0)
    assert env.observation_space["task"].table.names == [name_of(task) for task in tasks_of(name)]  # type: ignore[index]
    env.close()


def test_the_planner_is_evaluated_beside_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = []

    def recorded(model: M3PO, *args: Any) -> Any:
        samples.append(None if model.policy._planning is None else model.policy._planning.n_samples)
        return benchmark_evaluation(model, *args)

    benchmark_evaluation = benchmark.evaluate_per_task
    monkeypatch.setattr(benchmark, "evaluate_per_task", recorded)
    planned, options = tmp_path / "m3po-t,planned" / "small_seed0.csv", ("--eval-planning", "8", "1")
    alone = run(tmp_path / "alone", "small")
    rows = run(tmp_path, "small", *options)
    assert samples == [None, None] + 2 * [None, 8], "each evaluation twice, and training has not changed"
    for name in ("mean_reward", "steps", "n_updates"):
        assert [row[name] for row in rows] == [row[name] for row in alone]
    assert [row["steps"] for row in read_rows(planned)] == [row["steps"] for row in rows]
    assert {row["variant"] for row in read_rows(planned)} == {"t,planned"}
    planned.unlink()
    run(tmp_path, "small", *options)
    assert planned.exists(), "a run without them is not done"


def test_a_set_has_a_row_for_each_task(tmp_path: Path) -> None:
    rows = run(tmp_path, "small")
    # Three steps at a time
    assert [(int(row["steps"]), row["task"]) for row in rows] == [(s, t) for s in (1_002, 2_001) for t in "abc"]
    assert all(tuple(row) == TASK_COLUMNS and row["n_episodes"] == "10" and row["success_rate"] == "" for row in rows)
    model = M3PO.load(tmp_path / "saved" / "m3po-t" / "small_seed0" / "final.zip")
    assert model.task_table is not None and len(model.task_table) == 3


@pytest.mark.parametrize("train", ["all", "new"])
def test_a_task_is_taken_in(train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="--env small:-b --seeds 0"):
        run(tmp_path, "small:b", "--grown-from", "small:-b", "--train", train)
    run(tmp_path, "small:-b")
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr(benchmark, "train", lambda run: pytest.fail("an option that would do nothing"))
        run(tmp_path, "small:b", "--grown-from", "small:-b", "--train", train, "-p", "utd_ratio:2")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="check it out, or repeat that run"):
        patch.setattr(benchmark, "train_alike", lambda before, now: False)
        run(tmp_path, "small:b", "--grown-from", "small:-b", "--train", train)
    rows = run(tmp_path, "small:b", "--grown-from", "small:-b", "--train", train)
    # What it scores before it has seen the task, and then as often as any run
    assert [(int(row["steps"]), row["task"]) for row in rows] == [(0, "b"), (1_000, "b"), (2_000, "b")]
    model = M3PO.load(tmp_path / "saved" / f"m3po-t,grown-{train}" / "small_b_seed0" / "final.zip")
    assert model.task_table is not None and model.task_table.names == ["a", "c", "b"]
    assert model._n_frozen_tasks == (2 if train == "new" else 0)


def test_a_run_over_tasks_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_and_die(self: Any, steps: int) -> None:
        state = {"steps": steps, "wall": self.clock.wall, "cpu": self.clock.cpu}
        benchmark.save_checkpoint(self.model, self.run, state)
        raise KeyboardInterrupt

    def die(self: Any, steps: int) -> None:
        raise KeyboardInterrupt

    run(tmp_path, "small:-b")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # Before there is a checkpoint: the row before the start is not written twice
        patch.setattr(benchmark.Evaluate, "_checkpoint", die)
        run(tmp_path, "small:b", "--grown-from", "small:-b", "--train", "all")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(benchmark.Evaluate, "_checkpoint", save_and_die)
        run(tmp_path, "small:b", "--grown-from", "small:-b", "--train", "all")
    rows = run(tmp_path, "small:b", "--grown-from", "small:-b", "--train", "all")
    assert [int(row["steps"]) for row in rows] == [0, 1_000, 2_000]


# ---------------------------------------------------------------------- tables


def write(
    folder: Path,
    label: str,
    env_id: str,
    seed: int,
    scores: dict[str, list[float]],
    success: Any = "",
    left: int = 0,
    interval: int = 1_000,
) -> None:
    """Rows of a run that was stopped ``left`` evaluations before its end."""
    rows = []
    budget = interval * (len(next(iter(scores.values()))) - 1 + left)
    for i in range(len(next(iter(scores.values())))):
        for task, values in scores.items():
            row = dict.fromkeys(TASK_COLUMNS, "0") | {"seed": seed}
            rows.append(row | {"task": task, "steps": interval * i, "mean_reward": values[i], "success_rate": success})
            rows[-1] |= {"cpu_seconds": str(60 * i), "command": f"python -m benchmarks.run --steps {budget} --seeds {seed}"}
    write_rows(folder / label / f"{stem(env_id, seed)}.csv", rows, TASK_COLUMNS)


def test_a_curve_reaches_a_score_once() -> None:
    curve = Curve(np.array([0.0, 5.0, 10.0, 15.0]), np.array([0.0, 2.0, 1.0, 3.0]), np.zeros(4), np.zeros(4))
    assert [curve.reaches(score, curve.steps) for score in (-1, 2, 2.5, 4)] == [0, 5, 15, np.inf]
    # Where the other one was not looked at
    assert [curve.reaches(score, np.array([10.0, 15.0])) for score in (-1, 2)] == [0, 15]
    assert curve.final == 2.0


def test_shares_of_single_task_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(task_table.SINGLES, "small", ("one", "small:"))
    monkeypatch.setattr(task_table, "random_scores", lambda: {"small:a": 0.0, "small:b": -10.0, "small:c": 1.0})
    monkeypatch.setattr(task_table, "LEARNED", {"small:a": 10.0, "small:b": 10.5, "small:c": 0.5})
    for seed in (0, 1):
        scores = {"a": [0.0, 8.0, 8.0, 8.0 + 2 * seed], "b": [0.0] * 4, "c": [0.0] * 4}
        write(tmp_path, "many", "small", seed, scores, interval=3_000)
        write(tmp_path, "one", "small:a", seed, {"a": [10.0] * 4})
        write(tmp_path, "one", "small:b", seed, {"b": [10.0] * 4})
    task_table.share_table(tmp_path, "small", "many")
    lines = [line.split(" | ") for line in capsys.readouterr().out.strip().splitlines()]
    # (8 + 8.667) / 2 of 10; halfway from -10 to 10; the third has no agent of its own
    assert lines[2][0] == "| a" and lines[2][-1] == "0.83 |" and lines[2][1] == "8.333 (8.000, 8.667)"
    assert lines[3][-1] == "0.50 |" and lines[4][2] == "not run"
    assert lines[5][0] == "| mean of 2 of 3, each at most 1" and lines[5][-1].endswith("0.67 |")
    assert lines[7][0] == "Aimed at: a mean of 0.90, not all run yet. Without the bound of 1 it is 0.67."
    assert lines[8][0] == "Agents of one task below what was set down for them: b (10.5)."
    # While it plans, with agents that plan
    write(tmp_path, "many,planned", "small", 0, {"a": [10.0] * 4, "b": [0.0] * 4, "c": [0.0] * 4}, interval=3_000)
    write(tmp_path, "one,planned", "small:a", 0, {"a": [20.0] * 4})
    task_table.share_table(tmp_path, "small", "many,planned")
    planned = capsys.readouterr().out.strip().splitlines()
    assert planned[2] == "| a | 10.0 (10.0) | 20.0 (20.0) | 0.000 | 0.50 |" and "not run" in planned[3]
    # One that failed alone does not decide the mean
    write(tmp_path, "one", "small:c", 0, {"c": [0.5] * 4})
    write(tmp_path, "one", "small:a", 1, {"a": [-5.0] * 4})
    write(tmp_path, "one", "small:a", 0, {"a": [9.0] * 4})
    task_table.share_table(tmp_path, "small", "many")
    lines = [line.split(" | ") for line in capsys.readouterr().out.strip().splitlines()]
    assert [line[-1] for line in lines[2:6]] == ["4.17 |", "0.50 |", "2.00 |", "| 0.83 |"]
    assert "missed. Without the bound of 1 it is 2.22" in lines[-2][0]
    # One with another budget for the task is no measure of it
    write(tmp_path, "one", "small:b", 0, {"b": [10.0] * 5})
    write(tmp_path, "one", "small:b", 1, {"b": [10.0] * 3})
    task_table.share_table(tmp_path, "small", "many")
    assert "not run" in capsys.readouterr().out.splitlines()[4]
    write(tmp_path, "one", "small:a", 0, {"a": [10.0] * 4})
    # One that was stopped has no final score
    write(tmp_path, "one", "small:a", 1, {"a": [1.0] * 2}, left=2)
    task_table.share_table(tmp_path, "small", "many")
    assert capsys.readouterr().out.strip().splitlines()[2].endswith("0.83 |")


def test_what_single_task_agents_have_to_reach_is_set_down() -> None:
    singles = {prefix + name_of(task) for env_id, (_, prefix) in task_table.SINGLES.items() for task in tasks_of(env_id)}
    assert set(LEARNED) == singles


def test_how_much_faster_a_new_task_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(task_table.SINGLES, "small", ("one", "suite/"))
    # An agent of its own may have been trained where there are no tasks
    scores = [0, 4, 7, 9, 10, 10, 10]
    row: dict[str, Any] = {"seed": 0, "cpu_seconds": 0, "command": "--steps 6000"}
    rows = [row | {"steps": 1_000 * i, "mean_reward": x} for i, x in enumerate(scores)]
    write_rows(tmp_path / "one" / "suite-a_seed0.csv", rows, tuple(rows[0]))
    write(tmp_path, "m,grown-all", "small:a", 0, {"a": [3, 9, 10, 10]})
    task_table.growth_table(tmp_path, "small", "m")
    *_, ours, median, _, aim = capsys.readouterr().out.strip().splitlines()
    # 0.8 of 10 is reached at 3,000 and at 1,000 steps
    assert ours == "| a (all) | 8.000 |  | 3.000 | 9.667 | 3,000 | 1,000 | 3.0 |"
    assert median == "| median of 1 | | | | | | | 3.0 |" and aim == "Aimed at: a median of 2 over all 3."
    # Of three seeds from scratch two never come to 0.8 of the mean
    for seed, final in enumerate((30.0, 0.0, 0.0)):
        write(tmp_path, "one", "suite/b", seed, {"b": [0.0, final, final, final]})
    write(tmp_path, "m,grown-all", "small:b", 0, {"b": [0, 10, 10, 10]})
    task_table.growth_table(tmp_path, "small", "m")
    *_, ours, median, _, _ = capsys.readouterr().out.strip().splitlines()
    assert ours == "| b (all) | 8.000 |  | 0.000 | 10.0 | 1,000, inf, inf | 1,000 | > 3.0 (not in the median) |"
    assert median == "| median of 1 | | | | | | | 3.0 |"
    # Both are looked at as often: at 1,000 steps nobody saw the agent from scratch
    rows = [row | {"steps": 1_000 * i, "mean_reward": x} for i, x in ((0, 0), (2, 9), (3, 10))]
    rows = [row | {"command": "--steps 3000"} for row in rows]
    write_rows(tmp_path / "one" / "suite-a_seed0.csv", rows, tuple(rows[0]))
    task_table.growth_table(tmp_path, "small", "m")
    assert "| 2,000 | 2,000 | 1.0 |" in capsys.readouterr().out.splitlines()[3]


def test_a_task_that_is_known_at_once_or_never_learned_has_a_finite_ratio() -> None:
    steps = np.array([1_000.0, 5_000.0])
    assert task_table.how_much_faster([4_000, 3_000, 2_000], [0, 0, 1_000], steps) == (3.0, "")
    assert task_table.how_much_faster([4_000, 3_000, 2_000], [np.inf, np.inf, 1_000], steps) == (0.6, "<")
    assert task_table.how_much_faster([np.inf, np.inf, 3_000], [1_000, 0, 2_000], steps) == (5.0, ">")


def test_mean_success_over_tasks_and_seeds(tmp_path: Path, capsys: Any) -> None:
    for seed, success in ((0, 0.2), (1, 0.4)):
        write(tmp_path, "agent", "small", seed, {"a": [0, 0], "b": [0, 0], "c": [0, 0]}, success)
    write(tmp_path, "other", "small", 0, {"a": [0, 0], "b": [0, 0], "c": [0, 0]}, 0.1)
    write(tmp_path, "other", "small", 1, {"a": [0], "b": [0], "c": [0]}, 0.9, left=1)
    task_table.success_table(tmp_path, "small", ["agent", "nothing", "other"])
    assert capsys.readouterr().out.strip().splitlines()[2:] == [
        "| agent | 1,000 | 0.30 | 1.0 | 0.20, 0.40 | 0.30 | 0.30 | 0.30 | 1 |",
        "| other | 1,000 | 0.10 | 3.0 | 0.10 | 0.10 | 0.10 | 0.10 | 1 |",
        "",
        "Aimed at: a mean success of 0.70, and 2 times that of PPO and SAC.",
    ]
    assert load(tmp_path, "nothing", "small") == {}
    write(tmp_path, "agent", "small", 2, {"a": [0], "b": [0], "c": [0]}, 0.6, left=1)
    steps, successes = task_table.successes_over_time(load(tmp_path, "agent", "small"), ["a", "b", "c"])
    assert len(steps) == 2 and successes.tolist() == [[[0.2] * 2] * 3, [[0.4] * 2] * 3], "without the one that was stopped"
    task_table.success_figures(tmp_path, "small", ["nothing", "agent"], tmp_path / "images")
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"small-success.png", "small-tasks.png"}


def test_successes_are_those_of_the_steps_that_all_seeds_have() -> None:
    seeds = {}
    for seed, looked_at in enumerate(([0.0, 5.0, 10.0], [0.0, 10.0])):
        nothing = np.zeros(len(looked_at))
        seeds[seed] = {"a": Curve(np.array(looked_at), nothing, np.array(looked_at), nothing)}
    steps, successes = task_table.successes_over_time(seeds, ["a"])
    assert steps.tolist() == [0, 10] and successes.tolist() == [[[0, 10]], [[0, 10]]]


def test_docs_have_the_table_of_the_committed_results(capsys: Any) -> None:
    task_table.main([])
    printed = capsys.readouterr().out.strip()
    assert printed.startswith("| mt10 |")
    assert printed in (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.expensive
def test_speed_over_tasks(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.setattr(speed, "N_TASKS", (1, 3))
    monkeypatch.setattr(speed, "M3PO", partial(Hasty, sync_interval=16, utd_ratio=0.1))
    monkeypatch.setattr(speed, "ROUNDS", 1)
    speed.main(["--tasks", "--steps", "256"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 1", "| 3"] and "| 1.00 |" in lines[-2]
