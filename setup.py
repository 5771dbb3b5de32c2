"""Packaging of sb3_m3po. The settings of the development tools are in pyproject.toml."""

import shutil
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent


def write_zoo_hook(folder: str) -> list[str]:
    """Put what tells rl-zoo3 of M3PO beside the package: a module, and a file that imports it whenever Python starts."""
    module, start = Path(folder, "_sb3_m3po_zoo_hook.py"), Path(folder, "sb3_m3po_zoo_hook.pth")
    module.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "sb3_m3po" / "_zoo_hook.py", module)
    start.write_text(f"import {module.stem}\n", encoding="utf-8")
    return [str(module), str(start)]


class BuildPy(build_py):
    """Also builds the hook for rl-zoo3."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self._hook = write_zoo_hook(self.build_lib)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return super().get_outputs(include_bytecode) + getattr(self, "_hook", [])


class EditableWheel(editable_wheel):
    """The same for ``pip install -e``, where only what is put into the unpacked wheel is installed."""

    def _run_build_commands(self, dist_name: str, unpacked_wheel: str, *args: Any) -> Any:
        write_zoo_hook(unpacked_wheel)
        return super()._run_build_commands(dist_name, unpacked_wheel, *args)


# MuJoCo newer than 3.3.0 breaks Meta-World 3.1.1 and dm_control 1.0.28.
MUJOCO = ["gymnasium[mujoco]", "mujoco==3.3.0"]
# The plot scripts of rl_zoo3 do not import with pandas 3.
PANDAS = "pandas<3"

EXTRAS = {
    # Train, tune, plot and draw with rl-zoo3, whose `enjoy` imports requests and does not ask for it
    "zoo": ["rl_zoo3[plots]>=2.9,<3", "gymnasium[classic-control]", PANDAS, "tensorboard", "moviepy", "requests"],
    # Environments of the benchmarks
    "envs": [
        *MUJOCO,
        "gymnasium[box2d]",
        "metaworld==3.1.1",
        "dm_control==1.0.28",
        "shimmy==2.0.1",
        "minigrid>=3",
    ],
    # Intervals and pictures of several tasks
    "plots": ["rliable>=1.2", "matplotlib", PANDAS],
    # Start the processes of a study on several machines (docs/zoo.md)
    "ray": ["ray>=2.40"],
    # examples/demo.py
    "demo": [*MUJOCO, "matplotlib", "tqdm", "rich", "rl_zoo3>=2.9,<3", "pyyaml"],
    "docs": ["sphinx>=7,<10", "myst-parser>=4,<6", "furo", "sphinx-copybutton"],
    # The test suite, and Stable-Baselines3's own tests (`make conformance`)
    "tests": [
        *MUJOCO,
        "gymnasium[box2d]",
        "metaworld==3.1.1",
        "dm_control==1.0.28",
        "shimmy==2.0.1",
        "minigrid>=3",
        "rliable>=1.2",
        "sb3_contrib>=2.9,<3",
        # whose settings of PPO and SAC the benchmarks read
        "rl_zoo3>=2.9,<3",
        "pyyaml",
        # rl-zoo3's --track
        "wandb",
        "ale-py",
        "pytest>=8",
        "pytest-cov",
        "pytest-xdist",
        "tensorboard",
        "tqdm",
        "rich",
        "matplotlib",
        PANDAS,
        # to build the source distributions that `make conformance` takes the tests from
        "setuptools>=70",
        "wheel",
    ],
}
EXTRAS["dev"] = [
    *EXTRAS["tests"],
    *EXTRAS["docs"],
    "black>=26.1,<27",
    "ruff>=0.5.6",
    "mypy>=1.9,<3",
    "types-PyYAML",
    "build",
]

setup(
    name="sb3_m3po",
    version=(ROOT / "sb3_m3po" / "version.txt").read_text(encoding="utf-8").strip(),
    description="M3PO, a model-based policy optimization algorithm, for Stable-Baselines3",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    keywords="reinforcement-learning model-based world-model planning stable-baselines3 gymnasium pytorch",
    python_requires=">=3.10",
    packages=[*find_packages(include=["sb3_m3po", "sb3_m3po.*"]), "sb3_m3po.hyperparams"],
    package_dir={"sb3_m3po.hyperparams": "hyperparams"},
    package_data={"sb3_m3po": ["py.typed", "version.txt"], "sb3_m3po.hyperparams": ["*.yml"]},
    install_requires=[
        "stable_baselines3>=2.9,<3",
        "gymnasium>=1,<2",
        "torch>=2.8",
        "numpy",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["m3po-zoo=sb3_m3po.zoo:main"]},
    cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
