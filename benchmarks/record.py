"""What stands beside every number: the command, the commit, the machine. And the CSV files they go to."""

import csv
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch as th

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results")
CHECKPOINTS = Path("benchmarks/checkpoints")
RANDOM_CSV = Path("benchmarks/random_baseline.csv")
_SOURCES = ("sb3_m3po", "hyperparams", "setup.py", ":(glob)benchmarks/**/*.py")
#: What a training depends on
_TRAINING_SOURCES = ("sb3_m3po", *(f"benchmarks/{name}.py" for name in ("ablated", "algorithms", "envs", "task_sets")))


def commit() -> str:
    """
    :return: the checked-out commit, with a ``+`` when the sources differ from it, or ``unknown``
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if _git("status", "--porcelain", "--", *_SOURCES) else "")


def train_alike(one: str, other: str) -> bool:
    """
    :param one: a commit, as of :func:`commit`
    :param other: likewise
    :return: whether what a training depends on is the same in both; of sources that were not committed only if both are called
        the same. Where git or the commits are missing it can't be told, and counts as so
    """
    if one == other:
        return True
    if one.endswith("+") or other.endswith("+"):
        return False
    known = all(_git("cat-file", "-e", f"{name}^{{commit}}") is not None for name in (one, other))
    return not known or _git("diff", "--quiet", one, other, "--", *_TRAINING_SOURCES) is not None


def _git(*arguments: str) -> str | None:
    """Output of a git command in this repository, ``None`` if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine() -> str:
    """
    :return: processor, number of cores and the version of torch
    """
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name} x {os.cpu_count()}; torch {th.__version__}"


def reference_ms() -> float:
    """
    :return: CPU-milliseconds that some small products of matrices and their gradients take at the moment. What else the
        machine does slows a training down as it does these
    """
    x, weights = th.linspace(-1, 1, 128 * 256).view(128, 256), th.linspace(-0.1, 0.1, 256 * 256).view(256, 256)
    times = []
    for _ in range(5):
        started, w = time.process_time(), weights.clone().requires_grad_()
        with th.enable_grad():
            for _ in range(10):
                (((x @ w).relu() @ w).relu() @ w).square().mean().backward()
        times.append(1_000 * (time.process_time() - started))
    return sorted(times)[2]


def cpu_seconds() -> float:
    """
    :return: CPU-seconds of this process and of the processes that it started and waited for, compilers for instance
    """
    return time.process_time() + sum(os.times()[2:4])


class Clock:
    """
    Seconds of training, by the wall and by the CPU; it stands still while it is stopped.

    :param wall: wall seconds so far
    :param cpu: CPU-seconds so far
    """

    def __init__(self, wall: float = 0.0, cpu: float = 0.0) -> None:
        self.wall, self.cpu = wall, cpu
        self._since = (0.0, 0.0)

    def start(self) -> None:
        """Go on counting."""
        self._since = (time.perf_counter(), cpu_seconds())

    def stop(self) -> None:
        """Stand still and bring ``wall`` and ``cpu`` up to date."""
        self.wall += time.perf_counter() - self._since[0]
        self.cpu += cpu_seconds() - self._since[1]


def read_rows(path: Path) -> list[dict[str, str]]:
    """
    Read a results file; a last line that was cut off by a kill is left out.

    :param path: a CSV file, which may be missing
    :return: its rows
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def stem(env_id: str, seed: int | str) -> str:
    """
    :param env_id: id of the environment, or name of the set of tasks
    :param seed: seed of the training
    :return: how the files of the run are called
    """
    return f"{env_id.replace('/', '-').replace(':', '_')}_seed{seed}"


def load_runs(folder: Path, label: str, env_id: str) -> dict[int, list[dict[str, str]]]:
    """
    :param folder: where the CSV files are
    :param label: algorithm and variant, as the folder of the files is called
    :param env_id: id of the environment, or name of the set of tasks
    :return: by seed, the rows of each run that has any
    """
    runs = map(read_rows, (folder / label).glob(f"{stem(env_id, '*')}.csv"))
    return {int(rows[0]["seed"]): rows for rows in sorted(filter(None, runs), key=lambda rows: int(rows[0]["seed"]))}


def random_scores() -> dict[str, float]:
    """
    :return: mean return of a random policy, by environment
    """
    return {row["env"]: float(row["mean_reward"]) for row in read_rows(RANDOM_CSV)}


def write_rows(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """
    Replace a results file.

    :param path: where to
    :param rows: its rows
    :param columns: its header
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """
    Add a row to a results file and have it on the disk before returning.

    :param path: a file that ``write_rows`` made
    :param row: one value per column
    """
    with path.open("a", newline="") as file:
        csv.DictWriter(file, list(row), lineterminator="\n").writerow(row)
        file.flush()
        os.fsync(file.fileno())
