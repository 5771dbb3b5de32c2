"""
Run the tests of the installed rl_zoo3, unedited, with ``m3po`` in place of their algorithms.

    python tests/conformance_zoo/run.py                   all of them
    python tests/conformance_zoo/run.py -k test_train     arguments are pytest's
"""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "conformance"), str(HERE.parents[1])]

import imageio_ffmpeg  # noqa: E402
from run import WORK, outcome_of, source_of  # noqa: E402

from tests.hub import serving  # noqa: E402

SUITE, RESULTS = WORK / "zoo", WORK / "zoo.xml"
TINY = "dict(latent_dim=16,encoder_arch=[16],model_arch=[16],net_arch=dict(pi=[16],vf=[16]))"
SETTINGS = f"dict(n_timesteps=100, policy='MlpPolicy', learning_starts=50, policy_kwargs={TINY})"
#: What the tests use of the repository and the source distribution has not; of our own, with settings of M3PO
FILES = {
    "train.py": "from rl_zoo3.train import train\n\ntrain()\n",
    "enjoy.py": "from rl_zoo3.enjoy import enjoy\n\nenjoy()\n",
    "tests/test_config.yml": (
        f"Pendulum-v1:\n  n_timesteps: 1000\n  policy: MlpPolicy\n  env_kwargs: {{g: 5.0}}\n  policy_kwargs: {TINY}\n"
    ),
    "hyperparams/python/ppo_config_example.py": f"hyperparams = {{'MountainCarContinuous-v0': {SETTINGS}}}\n",
    "tests/dummy_env/test_env/__init__.py": (
        "from gymnasium.envs.registration import register\n\n"
        "register('TestEnv-v0', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=20)\n"
    ),
    "tests/dummy_env/test_env/config.py": f"hyperparams = {{'TestEnv-v0': {SETTINGS}}}\n",
    "scripts/parse_study.py": """
import argparse, json, pickle
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("-i")
parser.add_argument("-f", type=Path)
parser.add_argument("--print-n-best-trials", type=int)
parser.add_argument("--save-n-best-hyperparameters", type=int)
args = parser.parse_args()
with open(args.i, "rb") as file:
    best = sorted((t for t in pickle.load(file).trials if t.value is not None), key=lambda t: -t.value)
args.f.mkdir(parents=True)
for rank, trial in enumerate(best[: args.print_n_best_trials]):
    print(trial.number, trial.value, trial.params)
    (args.f / f"hyperparameters_{rank + 1}.json").write_text(json.dumps(trial.params))
""",
}
#: Environments for which the repository has trained agents that the tests use, and of which algorithm
AGENTS = {"CartPole-v1": "a2c", "Pendulum-v1": "sac"}
MIN_PASSED = 50


def make_suite() -> None:
    """Lay the tests out as in rl-zoo3's repository, with our conftest.py and small trained agents beside them."""
    shutil.rmtree(SUITE, ignore_errors=True)
    shutil.copytree(source_of("rl_zoo3") / "tests", SUITE / "tests")
    for name, code in FILES.items():
        (SUITE / name).parent.mkdir(parents=True, exist_ok=True)
        (SUITE / name).write_text(code, encoding="utf-8")
    shutil.copy(HERE / "conftest.py", SUITE)
    (SUITE / "bin").mkdir()
    (SUITE / "bin" / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    agents = SUITE / "rl-trained-agents"
    for env_id, original in AGENTS.items():
        options = ["-n", "300", "-f", str(agents), "-params", f"policy_kwargs:{TINY}"]  # not long enough to learn
        command = [sys.executable, "train.py", "--algo", "m3po", "--env", env_id, *options]
        subprocess.run(command, cwd=SUITE, check=True, stdout=subprocess.DEVNULL)
        (agents / original).symlink_to("m3po", target_is_directory=True)


def run_pytest(arguments: list[str]) -> None:
    """
    :param arguments: Further arguments of pytest
    """
    settings = source_of("rl_zoo3") / "pyproject.toml"
    options = ["-c", str(settings), "--rootdir", str(SUITE), "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal"]
    output = ["-q", "-rs", "--tb=short", "--durations=5", f"--junitxml={RESULTS}"]
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        # The tests call "python" and "ffmpeg", and want a screen for videos
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), str(SUITE / "bin"), os.environ.get("PATH", "")]),
        "DISPLAY": ":0",
        "SDL_VIDEODRIVER": "dummy",
        "MPLBACKEND": "Agg",
        "CONFORMANCE_ZOO": str(HERE),
    }
    command = [sys.executable, "-m", "pytest", *options, *output, *arguments, str(SUITE / "tests")]
    RESULTS.unlink(missing_ok=True)
    # The tests ask the Hugging Face hub which agents there are: none
    with serving() as hub:
        subprocess.run(command, cwd=SUITE, env={**environment, "HF_ENDPOINT": hub.url}, check=False)


def main(arguments: list[str]) -> int:
    """:return: The exit code"""
    WORK.mkdir(exist_ok=True)
    make_suite()
    run_pytest(arguments)
    if not RESULTS.exists():
        print("pytest could not run")
        return 1
    counts = Counter(outcome_of(case) for case in ElementTree.parse(RESULTS).iter("testcase"))
    print(f"rl-zoo3's tests with m3po: {counts['passed']} passed, {counts['failed']} failed,")
    print(f"{counts['not applicable']} cases can't apply (not_applicable.txt), {counts['skipped']} skipped themselves")
    return int(counts["failed"] > 0 or (not arguments and counts["passed"] < MIN_PASSED))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
