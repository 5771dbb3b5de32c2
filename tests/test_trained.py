"""The trained agents of examples/trained: rl-zoo3 finds and plays them, and they score what their table says."""

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rl_zoo3")
FOLDER = Path(__file__).parents[1] / "examples" / "trained"
AGENTS = sorted((FOLDER / "m3po").iterdir())


def table() -> dict[str, str]:
    """:return: Scores, by the name of the agent's folder"""
    rows = re.findall(r"^\| `(.+?)` \| [\d,]+ \| (.+?) \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows)


def test_all_agents_are_in_the_table() -> None:
    assert len(AGENTS) == 6 and set(table()) == {agent.name for agent in AGENTS}


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_an_agent_scores_what_the_table_says(agent: Path) -> None:
    pytest.importorskip("shimmy"), pytest.importorskip("minigrid")
    scores = runpy.run_path(str(FOLDER / "evaluate.py"))["scores"](agent, 4)
    claimed = dict(re.findall(r"(\S+) (-?[\d.]+) ±", table()[agent.name]))
    for task, returns in scores.items():
        # The first of the table's episodes only: a fifth, and 250 of Pendulum's 1,600, are chance
        assert np.mean(returns) > float(claimed[task]) - max(0.2 * abs(float(claimed[task])), 250 * ("Pendulum" in task))


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_rl_zoo3_plays_an_agent(agent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shimmy"), pytest.importorskip("minigrid")
    from rl_zoo3.enjoy import enjoy

    arguments = yaml.unsafe_load(next(agent.glob("*/args.yml")).read_text(encoding="utf-8"))
    packages = [word for package in arguments["gym_packages"] for word in ("--gym-packages", package)]
    command = ["enjoy", "--algo", "m3po", "--env", arguments["env"], "--folder", str(FOLDER), "--no-render", "-n", "1100"]
    monkeypatch.setattr("sys.argv", [*command, *packages])
    enjoy()
    assert "Mean reward" in capsys.readouterr().out


class Parsed(Exception):
    """Instead of a training, the arguments that rl-zoo3 made of its command line."""


def parsed(arguments: Any, *_: Any, **__: Any) -> None:
    raise Parsed(vars(arguments))


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_rl_zoo3_reads_the_command_of_an_agent_as_its_settings(agent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("shimmy"), pytest.importorskip("minigrid")
    import rl_zoo3.train

    words = shlex.split(next(agent.glob("*/command.txt")).read_text(encoding="utf-8"))
    assert words[:3] == ["python", "-m", "rl_zoo3.train"] and not any("'" in (word[0], word[-1]) for word in words)
    # A trained agent's settings say what its command said
    settings = dict(yaml.unsafe_load(next(agent.glob("*/args.yml")).read_text(encoding="utf-8")))
    monkeypatch.setattr(rl_zoo3.train, "ExperimentManager", parsed)
    monkeypatch.setattr("sys.argv", ["train", *words[3:]])
    with pytest.raises(Parsed) as caught:
        rl_zoo3.train.train()
    # The folder of the logs was another one while they were trained
    read = {**caught.value.args[0], "log_folder": settings["log_folder"]}
    assert read == settings


def read_settings(manager: Any) -> None:
    raise Parsed(dict(manager.read_hyperparameters()[1]))


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_the_command_of_an_agent_means_its_settings(agent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("shimmy"), pytest.importorskip("minigrid")
    import rl_zoo3.train

    words = shlex.split(next(agent.glob("*/command.txt")).read_text(encoding="utf-8"))
    monkeypatch.setattr(rl_zoo3.train.ExperimentManager, "setup_experiment", read_settings)
    monkeypatch.setattr("sys.argv", ["train", *words[3:]])
    with pytest.raises(Parsed) as caught:
        rl_zoo3.train.train()
    assert caught.value.args[0] == dict(yaml.unsafe_load(next(agent.glob("*/config.yml")).read_text(encoding="utf-8")))
