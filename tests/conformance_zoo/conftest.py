"""Stands beside rl-zoo3's tests while they run, see `run.py`: every command that names an algorithm gets `m3po` instead."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import stable_baselines3

from sb3_m3po import M3PO

stable_baselines3.A2C = M3PO  # type: ignore[misc,assignment]


def with_m3po(command: list[str]) -> list[str]:
    """
    :param command: Of a script of rl-zoo3
    :return: The same for `m3po`. Its results are found under the name of the original too, where the test looks for them
    """
    words = list(command)
    for option in ("--algo", "-a"):
        if option in words:
            place = words.index(option) + 1
            original, words[place] = words[place], "m3po"
            for folder in (words[words.index(name) + 1] for name in ("--log-folder", "-f", "--f") if name in words):
                results = Path(folder, "m3po")
                results.mkdir(parents=True, exist_ok=True)
                if not Path(folder, original).exists():
                    Path(folder, original).symlink_to(results, target_is_directory=True)
    if "-n" in words and words[words.index("-n") + 1] == "10000":  # a training for its checkpoints, not for its score
        words += ["-params", "utd_ratio:0.05"]
    return words


Popen = subprocess.Popen


class Started(Popen):  # type: ignore[type-arg]
    def __init__(self, args: Any, *rest: Any, **options: Any):
        super().__init__(with_m3po(args) if isinstance(args, list) else args, *rest, **options)


subprocess.Popen = Started  # type: ignore[misc]  # subprocess.call starts its command by it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lines = Path(os.environ["CONFORMANCE_ZOO"], "not_applicable.txt").read_text(encoding="utf-8").splitlines()
    reasons = dict(line.split(" | ") for line in lines if line and not line.startswith("#"))
    for item in items:
        for case, reason in reasons.items():
            if item.nodeid == case or item.nodeid.startswith(case + "["):
                item.add_marker(pytest.mark.skip(reason=f"not applicable: {reason}"))
