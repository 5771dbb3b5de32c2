"""The comparison with other agents: scores, steps and seconds to a score, and that it is drawn from CSV files alone."""

import inspect
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from benchmarks import ablations, report, scaling, speed, suite
from benchmarks.ablated import ConstantEntropy, CriticsAlone, LastNetworks, LateEntropy, ModelFree, Undelayed
from benchmarks.algorithms import Settings, apply_overrides
from benchmarks.curves import PUBLISHED_CSV, Curve, Results, interquartile_means, median_with_bounds
from benchmarks.record import RESULTS, read_rows, stem, write_rows
from benchmarks.run import COLUMNS, Run
from benchmarks.suites import ENVIRONMENTS, budgets, core_hours
from sb3_m3po import M3PO
from sb3_m3po.memory import ReplayMemory
from sb3_m3po.world_model import Sizes
from tests.helpers import Hasty


def test_steps_and_seconds_to_a_score_lie_between_evaluations():
    curve = Curve(np.array([10, 20, 30]), np.array([[0.0, 0.4, 0.8], [0.2, 0.6, 1.0]]), np.array([[1.0, 2, 4], [3, 4, 6]]))
    assert curve.mean == pytest.approx([0.1, 0.5, 0.9])
    assert curve.steps_to(0.5) == 20
    assert curve.steps_to(0.7) == pytest.approx(25)
    assert curve.seconds_to(0.7) == pytest.approx(4)
    assert curve.steps_to(0.05) == pytest.approx(5), "a random policy scores 0 at 0 steps"
    assert curve.steps_to(0.95) == curve.seconds_to(0.95) == np.inf
    assert curve.at(29) == pytest.approx([0.4, 0.6]) and curve.at(9) == pytest.approx([0, 0])
    assert curve.after(3.5) == pytest.approx([0.4, 0.2]) and curve.after(2) == pytest.approx([0.4, 0])


def test_what_has_not_learned_reaches_no_score():
    curve = Curve(np.array([10, 20, 30]), np.array([[0.3, 0.3, 0.9]]), np.array([[1.0, 2, 4]]), n_untrained=1)
    assert curve.steps_to(0.2) == 20 and curve.seconds_to(0.2) == 2
    assert curve.steps_to(0.6) == pytest.approx(25)
    assert Curve(curve.steps, curve.scores, curve.cpu_seconds, n_untrained=3).steps_to(0.2) == np.inf


def test_interquartile_means_leave_out_the_outer_quarters_and_are_the_same_again():
    scores = np.array([[[-100.0], [1], [2], [100]], [[-100], [1.2], [2.2], [100]], [[-100], [1.4], [2.4], [100]]])
    found = interquartile_means(scores, 200)
    assert found.shape == (3, 1) and found[:, 0] == pytest.approx([1.7, 1.5, 1.9], abs=0.11)
    np.random.seed(1)
    assert np.array_equal(interquartile_means(scores, 200), found)


@pytest.mark.parametrize(
    ("ratios", "bound", "text"),
    [
        ([(3.0, False), (1.0, True), (5.0, False)], "<", "3.0"),
        ([(3.0, False), (4.0, True), (5.0, False)], "<", "< 4.0"),
        # Four could be two, and then the median would be three
        ([(3.0, False), (4.0, True), (2.0, False)], "<", "< 3.0"),
        ([(3.0, True), (1.0, False), (5.0, False), (7.0, False)], "<", "< 4.0"),
        ([(3.0, False), (6.0, True), (5.0, False)], ">", "5.0"),
        ([(3.0, False), (2.0, True), (5.0, False)], ">", "> 3.0"),
    ],
)
def test_a_median_says_when_it_is_only_a_bound(ratios, bound, text):
    assert median_with_bounds(ratios, bound, 1) == text


def test_agents_of_different_budgets_are_smoothed_alike(tmp_path):
    """The same learner, looked at ten times as often."""
    results = Results(tmp_path)
    low, high = results.random["LunarLander-v3"], results.reference["LunarLander-v3"]
    for label, interval, end in ((report.M3PO, 5_000, 100_000), (report.PPO, 5_000, 1_000_000)):
        returns = [low + (high - low) * (1 - np.exp(-steps / 20_000)) for steps in range(interval, end + 1, interval)]
        record(tmp_path, label, "LunarLander-v3", 0, returns, interval, 1.0)
    mine, theirs = (results.curve(label, "LunarLander-v3") for label in (report.M3PO, report.PPO))
    assert report.race(mine, theirs, 0.95 * theirs.mean[-1])[1][0] == pytest.approx(1.0)
    # One that was killed is no whole run
    record(tmp_path, report.M3PO, "LunarLander-v3", 1, returns[:19], 5_000, 1.0)
    assert len(results.curve(report.M3PO, "LunarLander-v3").scores) == 1


@pytest.mark.parametrize(("mine", "theirs"), [(5_000, 75_000), (2_000, 60_000), (20_000, 200_000)])
def test_who_learns_so_many_times_as_fast_is_found_to(mine, theirs, tmp_path):
    """With the evaluations that such runs have; two of M3PO's seeds with fewer."""
    results, env_id = Results(tmp_path), "LunarLander-v3"
    low, high = results.random[env_id], results.reference[env_id]
    for label, budget, tau in ((report.M3PO, 100_000, mine), (report.PPO, 1_000_000, theirs)):
        run = Run(label, "x", env_id, 0, budget, Settings(), "", out=tmp_path)
        dense = [run.next_evaluation(0)]
        while dense[-1] < budget:
            dense.append(run.next_evaluation(dense[-1]))
        for seed, grid in enumerate((dense, dense, range(5_000, budget + 1, 5_000))):
            rows = [{"seed": seed, "command": "", "machine": "", "commit": "", "n_updates": 1, "steps": x} for x in grid]
            returns = [low + (high - low) * (1 - np.exp(-row["steps"] / tau)) for row in rows]
            rows = [row | {"mean_reward": x, "cpu_seconds": row["steps"] / 100} for row, x in zip(rows, returns, strict=True)]
            write_rows(tmp_path / label / f"{stem(env_id, seed)}.csv", rows, tuple(rows[0]))
    curve, other = (results.curve(label, env_id) for label in (report.M3PO, report.PPO))
    _, steps, seconds = report.race(curve, other, 0.95 * other.mean[-1])
    assert steps[0] == pytest.approx(theirs / mine, rel=0.1)
    assert seconds[0] == pytest.approx(1 / steps[0])


def record(
    folder: Path, label: str, env_id: str, seed: int, returns: list[float], interval: int, cpu: float, command: str = ""
) -> None:
    """Rows of a run with these returns, one evaluation after each interval."""
    algo, _, variant = label.partition("-")
    rows = [dict.fromkeys(COLUMNS, 0) | {"algo": algo, "variant": variant, "env": env_id, "seed": seed} for _ in returns]
    for i, (row, mean) in enumerate(zip(rows, returns, strict=True)):
        row["command"] = command
        row |= {
            "steps": interval * (i + 1),
            "mean_reward": mean,
            "cpu_seconds": cpu * (i + 1),
            "n_updates": i + 1,
            "reference_ms": "",
        }
    write_rows(folder / label / f"{stem(env_id, seed)}.csv", rows, COLUMNS)


def test_report_is_made_from_csv_files_alone(tmp_path, capsys):
    low, high = Results(tmp_path).random["Pendulum-v1"], -157.0
    returns = [low + share * (high - low) for share in (0.5, 1.0, 1.0, 1.0)]
    for seed in (0, 1):
        record(tmp_path, report.M3PO, "Pendulum-v1", seed, returns, 25_000, 100.0)
        record(tmp_path, report.PPO, "Pendulum-v1", seed, returns, 250_000, 25.0)
        record(tmp_path, report.PPO, "Hopper-v5", seed, [15.5482] * 4, 250_000, 25.0)
        record(tmp_path, report.M3PO, "Hopper-v5", seed, [15.5482] * 4, 25_000, 25.0)
        record(tmp_path, report.M3PO, "dm_control/walker-walk-v0", seed, [900.0] * 4, 25_000, 25.0)
        record(tmp_path, report.M3PO, "dm_control/cheetah-run-v0", seed, [900.0] * 4, 25_000, 25.0)
    report.main(["--results", str(tmp_path), "--out", str(tmp_path / "report")])
    text = (tmp_path / "report" / "tables.md").read_text()
    assert text.split("\n\n", 1)[1].strip() == capsys.readouterr().out.strip()
    # 0.95 lies at 0.9 of the way from the first to the second evaluation
    assert "| Pendulum-v1 | PPO (rl-zoo3's) | 2, 2 | 1.00 | 475,000 | 47,500 | 10.0 | 48 | 190 | 4.00 |" in text
    assert "| **median** of 1, 0 of them never reached |  |  |  |  |  | **10.0** |  |  | **4.00** |" in text
    assert "Not compared, because the opponent ends below 0.1: Hopper-v5 (PPO (rl-zoo3's): 0.00)." in text
    assert "Not run yet: CartPole-v1, Acrobot-v1, " in text
    assert "Not run in all of these yet: M3PO in classic, M3PO, planning in classic, PPO (rl-zoo3's) in classic, " in text
    assert "| dm_control/walker-walk-v0 | 0.896 | 0.960 | 0.886 | > 100,000 | < 1.0 |" in text
    # It was not looked at before 25,000 frames
    assert re.search(r"cheetah-run-v0 \| 0\.\d+ \| 0\.5\d+ \| 0\.6\d+ \| 25,000 \| 4\.0 \|", text)
    assert "| tuned PPO's steps to its last score / M3PO's, median | 15 | 10.0 (of 1) | not all run yet |" in text
    assert (
        "PPO (rl-zoo3's) on CartPole-v1" in text and "M3PO on Ant-v5, PPO (rl-zoo3's) on Ant-v5, M3PO on dm_control/" in text
    )
    assert "| M3PO | 0 | yes |" in text and "Not run in all" in text
    assert {path.suffix for path in (tmp_path / "report").iterdir()} == {".md", ".png"}


@pytest.mark.parametrize(
    ("found", "reach", "least", "said"),
    [
        ("15.0", 15, True, "met"),
        ("14.9", 15, True, "missed"),
        ("< 20.0 (of 9)", 15, True, "not known"),
        ("< 10.0", 15, True, "missed"),
        ("0.30", 0.3, False, "met"),
        ("0.31", 0.3, False, "missed"),
        ("> 0.20", 0.3, False, "not known"),
        ("> 0.40", 0.3, False, "missed"),
        ("-0.154", -0.1, True, "missed"),
        ("+0.020", -0.1, True, "met"),
    ],
)
def test_a_verdict_is_given_of_what_is_known(found, reach, least, said):
    assert report.verdict(found, reach, least) == said


def test_aims_are_judged_where_everything_was_run(tmp_path):
    results = Results(tmp_path)
    for env_id in report.EVERYWHERE:
        low, high = results.random[env_id], results.reference[env_id]
        for label in (report.M3PO, report.PPO, *report.OFF_POLICY_AGENTS):
            if report.may_run(label, env_id):
                share, cpu = (1.0, 40.0) if label == report.M3PO else (0.5, 100.0)
                n = 4 if label != report.PPO else max(4, results.budget_of(label, env_id) // 25_000)
                interval = results.budget_of(label, env_id) // n
                returns = [low + share * (high - low) * min(1, (i + 1) / n) for i in range(n)]
                record(tmp_path, label, env_id, 0, returns, interval, cpu)
    lines = [line[2:-2].split(" | ") for line in report.claims_table(results).splitlines()[2:]]
    assert [line[2].partition(" ")[2] for line in lines] == ["(of 10)", "(of 6)", "", "(of 8)", "", "(of 10)", "(of 6)"]
    assert {line[3] for line in lines} == {"met", "missed"}
    # M3PO is where SAC ends after half of its steps and a fifth of its seconds
    assert lines[1][2:] == ["2.0 (of 6)", "missed"] and lines[-1][2:] == ["0.20 (of 6)", "met"]


def test_an_interval_takes_three_seeds(tmp_path):
    for seed in range(3):
        for env_id in report.OFF_POLICY:
            record(tmp_path, report.SAC, env_id, seed, [1.0 + seed] * 4, 25_000, 1.0)
        row = next(line for line in report.scores_table(Results(tmp_path)).splitlines() if "| SAC |" in line)
        assert (" to " in row) == (seed == 2) and f"| SAC | {seed + 1} |" in row


def test_speeds_of_all_machines_are_told() -> None:
    table = report.speed_table(RESULTS)
    assert "| AMD EPYC x 2 | highest | 9,470 | 64 (66) | 75 (76) |" in table and "| AMD EPYC x 2 | medium | 11,750 |" in table


def test_how_quick_the_machine_was_is_told(tmp_path):
    for label, milliseconds in ((report.M3PO, 30), (report.PPO, 20)):
        record(tmp_path, label, "Pendulum-v1", 0, [-157.0] * 4, 25_000, 1.0)
        path = tmp_path / label / f"{stem('Pendulum-v1', 0)}.csv"
        write_rows(path, [row | {"reference_ms": milliseconds} for row in read_rows(path)], COLUMNS)
    note = "CPU-milliseconds of a fixed piece of work, in M3PO's runs by those in the opponent's: Pendulum-v1 1.50."
    assert note in report.races(Results(tmp_path), ["Pendulum-v1"], (report.PPO,)).table


def test_returns_stand_beside_published_ones(tmp_path):
    results = Results(tmp_path)
    scores = results.score("Ant-v5", np.array([[-50.0, 0.0], [1_234.5, 4_615.8]]))
    assert results.returns("Ant-v5", scores) == pytest.approx(np.array([[-50.0, 0.0], [1_234.5, 4_615.8]]))
    for label, last in ((report.M3PO, 900.0), (report.PLANNED, 910.0)):
        for seed in (0, 1):
            record(tmp_path, label, "dm_control/hopper-hop-v0", seed, [0.0, 5.0, 1.0, last + seed], 25_000, 1.0)
            record(tmp_path, label, "LunarLanderContinuous-v3", seed, [0.0, 5.0, 1.0, last], 25_000, 1.0)
    record(tmp_path, report.M3PO, "Ant-v5", 0, [0.0] * 4, 25_000, 1.0)
    table = report.returns_table(results).splitlines()
    names = table[0].strip("| ").split(" | ")
    assert names[:4] == ["environment", "seeds", "M3PO", "M3PO, planning"]
    # To a name in the table the return that stands in the file
    hop = dict(zip(names, table[3].strip("| ").split(" | "), strict=True))
    assert (hop["seeds"], hop["M3PO"], hop["M3PO, planning"]) == ("2", "900", "910")
    rows = {row["method"]: float(row["mean"]) for row in read_rows(PUBLISHED_CSV) if row["env"] == "dm_control/hopper-hop-v0"}
    for name in report.PUBLISHED:
        assert hop[name] == report.readable(rows[name])
    best = max(rows, key=lambda name: rows[name])
    assert hop["best of all published"] == f"{rows[best]:.0f}, {best}"
    assert table[2].startswith("| LunarLanderContinuous-v3 | 2 | 900 | 910 |  |  | ") and len(table[3:]) == 3
    assert "Ant-v5" in table[-1], "its planned evaluations are not there"


def test_documentation_and_readme_have_todays_returns() -> None:
    table, readme = report.returns_table(Results(RESULTS)), Path("README.md").read_text()
    assert table in Path("docs/benchmarks.md").read_text()
    lines = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("| ")]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    beside = [row for row in rows if row["MR.Q"]]
    for row in beside:
        cells = [row[name] for name in ("environment", "M3PO", "M3PO, planning", "SAC", "TD-MPC2", "MR.Q")]
        assert f"\n| {' | '.join(cells)} |\n" in readme
    assert beside


def test_seconds_of_other_products_are_told(tmp_path):
    returns = [-157.0] * 4
    record(tmp_path, report.M3PO, "Pendulum-v1", 0, returns, 25_000, 100.0, "--steps 100000 --matmul medium")
    record(tmp_path, report.PPO, "Pendulum-v1", 0, returns, 25_000, 100.0)
    note = "Seconds of different machines or precisions of matrix products: Pendulum-v1."
    assert note in report.races(Results(tmp_path), ["Pendulum-v1"], (report.PPO,)).table
    record(tmp_path, report.PPO, "Pendulum-v1", 0, returns, 25_000, 100.0, "--matmul medium")
    assert note not in report.races(Results(tmp_path), ["Pendulum-v1"], (report.PPO,)).table


def test_an_evaluation_just_after_its_step_counts(tmp_path):
    """Sixteen environments come to 5,008, 10,000, 15,008: as many evaluations are averaged as with one."""
    low, high = Results(tmp_path).random["LunarLander-v3"], 242.1
    steps = {"one": [*range(5_000, 100_001, 5_000)], "many": [x + 8 * (x % 10_000 > 0) for x in range(5_000, 100_001, 5_000)]}
    found = []
    for label, mine in steps.items():
        rows = [{"seed": 0, "command": "", "machine": "", "commit": "", "n_updates": 1, "steps": x} for x in mine]
        rows = [row | {"mean_reward": low + (high - low) * row["steps"] / 1e5} for row in rows]
        rows = [row | {"cpu_seconds": row["steps"] / 100} for row in rows]
        write_rows(tmp_path / label / f"{stem('LunarLander-v3', 0)}.csv", rows, tuple(rows[0]))
        curve = Results(tmp_path).curve(label, "LunarLander-v3")
        found.append([curve.at(x).item() for x in report.CHECKPOINTS])
        # A mean stands for the middle of its evaluations, in seconds too
        assert curve.steps_to(0.5) == pytest.approx(50_000) and curve.seconds_to(0.5) == pytest.approx(500)
    assert found[0] == pytest.approx([0.25, 0.4833, 0.95], abs=1e-4) and found[1] == pytest.approx(found[0], abs=1e-3)


def test_a_batch_says_how_long_it_takes_before_it_starts(capsys):
    suite.main(["classic", "--algo", "ppo", "--zoo", "--seeds", "0", "1", "--dry-run"])
    hours = 2 * sum(core_hours("ppo", env_id, steps) for env_id, steps in budgets("classic", "ppo", zoo=True).items())
    assert capsys.readouterr().out == f"12 runs, about {hours:.1f} core-hours of training (0 are done)\n"
    assert budgets("classic", "ppo", zoo=True)["MountainCarContinuous-v0"] == 20_000
    assert set(budgets("off-policy", "sac", zoo=False).values()) == {100_000}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["atari", "--dry-run"], "atari"),
        (["classic", "--envs", "Hopper-v5"], "Hopper-v5"),
        (["classic"], "--name 100k"),
        (["table", "--zoo"], "zoo-table"),
    ],
)
def test_a_batch_is_refused_that_is_unknown_or_would_overwrite_the_table(options, message, monkeypatch, capsys):
    monkeypatch.setattr(suite, "run_commands", lambda commands, jobs: 0)
    with pytest.raises(SystemExit) as stop:
        suite.main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_every_environment_has_a_random_score_and_a_reference_above_it():
    results = Results(Path())
    for environment in ENVIRONMENTS:
        assert results.random[environment.env_id] < environment.reference


def test_ablations_change_one_thing_and_run_the_defaults_once():
    runs = [command for _, command in ablations.commands(list(ablations.PARTS), [0], "highest")]
    names = {command[command.index("--name") + 1]: command for command in runs}
    # One part differs only where actions are sampled; half of the episodes are planned by default where they are not, and all
    # of them in the three other environments
    same = sum(len(ablations.PARTS[part]) - 1 for part in ablations.SAMPLED_ONLY)
    assert len(runs) == len(names) * len(ablations.ENV_IDS) - same - 1 - 3
    assert names["ablation"][-5:] == ["--name", "ablation", "--eval-planning", "32", "1"]
    *_, (_, other) = ablations.commands(["bonus"], [0], "medium")
    assert other[-4:] == ["--matmul", "medium", "-p", "bonus_coef:0.3"]
    assert names["ablation,planner=none"][-5:] == ["-p", "plan_rollouts:False", "--eval-planning", "32", "1"]
    assert ablations.label("planner", "both", "HalfCheetah-v5") == "m3po-ablation,planned"
    assert ablations.label("planner", "predict", "HalfCheetah-v5") == "m3po-ablation,planner=none,planned"
    assert ablations.label("target_entropy", "constant", "LunarLander-v3") == "m3po-ablation"
    assert ablations.label("planner", "both", "LunarLander-v3") == "m3po-ablation,planner=collect,planned"
    assert ablations.label("planner", "half", "LunarLander-v3") == "m3po-ablation"
    assert names["ablation,planner=collect"][-5:-3] == ["-p", "plan_rollouts:True"]
    steps = {
        env_id: command[command.index("--steps") + 1] for env_id, command in ablations.commands(["bonus"], [0], "highest")
    }
    assert [*steps.values()] == ["30000", "30000", "30000", "50000"]
    costs = {ratio: ablations.hours("HalfCheetah-v5", ["-p", f"utd_ratio:{ratio}"]) for ratio in (0.5, 1.0)}
    assert costs[0.5] == 0.5 * costs[1.0] == 0.5 * ablations.hours("HalfCheetah-v5", [])
    assert names["ablation,world_model=latent-only"][-4:-2] == ["--algo", "benchmarks.ablated:CriticsAlone"]
    assert names["ablation,trust_region=none-256"][-4:] == ["-p", "target_kl:None", "-p", "sync_interval:256"]
    assert ablations.label("world_model", "off", "HalfCheetah-v5") == "ModelFree-ablation,world_model=off"
    defaults = {name: parameter.default for name, parameter in inspect.signature(M3PO).parameters.items()}
    for part, value in ablations.DEFAULTS.items():
        options = ablations.PARTS[part][value] if part != "planner" else []
        changed = apply_overrides({}, options[1::2] if "-p" in options else [])
        networks = changed.pop("policy_kwargs", {})
        assert all(getattr(Sizes(), name) == setting for name, setting in networks.items())
        assert all(defaults[name] == setting for name, setting in changed.items()), "what it calls a default is one"


def test_ablations_are_told_from_csv_files(tmp_path, capsys):
    for env_id in ablations.ENV_IDS:
        random, reference = (getattr(Results(tmp_path), name)[env_id] for name in ("random", "reference"))
        for seed, share in ((0, 0.4), (1, 0.6)):
            returns, cpu = [random + share * (reference - random)] * 5, 24.0
            record(tmp_path, "m3po-ablation", env_id, seed, returns, 10_000, cpu)
            record(tmp_path, "m3po-ablation,critics=5", env_id, seed, [2 * x - random for x in returns], 10_000, cpu)
    options = ["--only", "critics", "--dry-run", "--results", str(tmp_path), "--images", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        ablations.main(options)
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "| 2 (default) | 2 | " + "0.50 (0.40 to 0.60) | " * 4 + "0.500 | 50% | 0.450 | 2 |",
        "| 5 | 2 | " + "1.00 (0.80 to 1.20) | " * 4 + "1.000 | 100% | 0.900 | 2 |",
    ]
    assert (tmp_path / "ablation-critics.png").exists()


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_without_its_world_model_the_encoder_learns_from_the_critics(env_id):
    model = ModelFree("MlpPolicy", env_id, learning_starts=128, batch_size=32, sync_interval=32, seed=0, device="cpu")
    before = {name: value.clone() for name, value in model.policy.world_model.named_parameters()}
    model.learn(512)
    moved = {name for name, value in model.policy.world_model.named_parameters() if not value.equal(before[name])}
    assert any(name.startswith("encoder") for name in moved) and any(name.startswith("critics") for name in moved)
    assert any(name.startswith("trunk") for name in moved) == (env_id == "Pendulum-v1")
    assert not any(name.startswith(("heads", "value")) for name in moved), "nothing else learns what the model would predict"


@pytest.mark.parametrize("without", [CriticsAlone, ConstantEntropy])
def test_without_a_part_of_the_policy_s_objective_it_learns_otherwise(without):
    kwargs = dict(learning_starts=128, batch_size=32, sync_interval=32, n_steps=128, seed=0, device="cpu")
    actors = []
    for cls in (M3PO, M3PO, without):
        model = cls("MlpPolicy", "Pendulum-v1", **kwargs)
        with th.no_grad():
            # These start at zero: then neither gain has a gradient
            for weights in (model.policy.world_model.heads.weight, model.policy.world_model.critics.weights[-1]):
                weights.normal_(generator=th.Generator().manual_seed(0))
        model.learn(128)
        actors.append(th.cat([p.flatten() for p in model.policy.world_model.actor.parameters()]))
    assert actors[0].equal(actors[1]) and not actors[0].equal(actors[2])


@pytest.mark.parametrize(("progress", "target"), [(0.0, -0.5), (0.8, -0.9), (0.9, -1.45), (1.0, -2.0)])
def test_the_target_entropy_falls_further_at_the_end(progress, target):
    model = LateEntropy("MlpPolicy", "Pendulum-v1", device="cpu")
    model._current_progress_remaining = 1 - progress
    codec = model.policy.world_model.codec
    assert codec.target_entropy * (1 + codec.entropy_fall * model._learner().progress) == pytest.approx(target)


@pytest.mark.parametrize(("cls", "share"), [(M3PO, 0.5), (Undelayed, 1.0)])
def test_policy_without_delay(cls, share, monkeypatch):
    monkeypatch.setattr("sb3_m3po.learner.DELAYED_AFTER", 0)
    model = cls("MlpPolicy", "Pendulum-v1", learning_starts=64, batch_size=32, sync_interval=32, n_steps=64, device="cpu")
    optimizer = model.learn(128).policy.optimizer
    actor, critic = (
        optimizer.state[p]["step"].item()
        for p in (model.policy.world_model.actor[-1].bias, model.policy.world_model.critics.biases[0])
    )
    assert critic == model._n_updates > 0 and actor == share * critic


@pytest.mark.parametrize("cls", [M3PO, LastNetworks])
def test_without_the_mean_it_learns_the_same_and_predicts_by_the_last_networks(cls):
    kwargs = dict(learning_starts=128, batch_size=32, sync_interval=32, n_steps=128, seed=0, device="cpu")
    models = [made("MlpPolicy", "Pendulum-v1", **kwargs).learn(128) for made in (M3PO, cls)]
    networks = [dict(model.policy.world_model.named_parameters()) for model in models]
    assert all(value.equal(networks[1][name]) for name, value in networks[0].items())
    mean = dict(models[1].policy.mean.world_model.named_parameters())
    assert all(value.equal(networks[1][name]) for name, value in mean.items()) == (cls is LastNetworks)


def test_scaling(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(scaling, "M3PO", Hasty)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(scaling, "time_calls", partial(speed.time_calls, seconds=0.01))
    axes = {"environments": {4: {"n_envs": 4}}, "memory": {2_000: {"buffer_size": 2_000, "full": True}}}
    monkeypatch.setattr(scaling, "AXES", axes)
    scaling.main(["--axes", *axes, "--steps", "256", "--csv", str(tmp_path / "scaling.csv")])
    rows = read_rows(tmp_path / "scaling.csv")
    assert [(row["axis"], row["value"]) for row in rows] == [("environments", "4"), ("memory", "2000")]
    assert all(float(row["update_cpu_ms"]) > 0 and float(row["planned_step_ms"]) > 0 for row in rows)
    # 17 numbers, and one slot more than transitions; as many bytes were allocated as transitions need
    assert rows[1]["observation_bytes"] == "68"
    assert float(rows[1]["transition_bytes"]) < 2.2 * 68 + 64


@pytest.mark.parametrize("length", [30, 500])
def test_an_image_is_stored_once(length):
    """The last one of an episode, which nothing follows, is one more: with 30 steps a thirtieth."""
    shape = (36, 36, 3)
    memory = ReplayMemory(5_000, spaces.Box(0, 255, shape, np.uint8), spaces.Box(-1, 1, (2,)), 1)
    seen = np.zeros((1, *shape), np.uint8)
    for step in range(5_000):
        memory.add(seen, np.zeros((1, 2)), np.zeros(1), seen, np.zeros(1, bool), np.array([step % length == length - 1]))
    assert scaling.transition_bytes(memory) < 1.05 * np.prod(shape)
