"""The wheel holds what a user needs, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:return: The wheel of this clone, built from a copy: building writes beside the sources"""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("sb3_m3po", "hyperparams"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_its_data_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {name for name in names if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sb3_m3po").rglob("*") if path.is_file()}
    expected = {name for name in expected if "__pycache__" not in name}
    hook = {"_sb3_m3po_zoo_hook.py", "sb3_m3po_zoo_hook.pth"}
    assert files == expected | {"sb3_m3po/hyperparams/m3po.yml"} | hook
    assert {"sb3_m3po/py.typed", "sb3_m3po/version.txt"} <= files
    assert any(name.endswith("LICENSE") for name in names)


def test_installed_wheel_can_be_imported(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True)
    code = "import sys; sys.path.insert(0, '.'); import sb3_m3po; print(sb3_m3po.__file__, sb3_m3po.__version__)"
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True, env={})
    file, version = output.stdout.split()
    assert Path(file).resolve().is_relative_to(tmp_path.resolve())
    assert version == (ROOT / "sb3_m3po" / "version.txt").read_text().strip()
