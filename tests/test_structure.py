"""The walls of the house: who imports whom, what importing costs, what is documented, how long files are."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sb3_m3po

PACKAGE = Path(sb3_m3po.__file__).parent
#: A file imports only from files that stand before it
ORDER = [
    "discount",
    "tasks",
    "math",
    "nets",
    "optim",
    "actions",
    "masked_actions",
    "world_model",
    "planner",
    "losses",
    "observations",
    "memory",
    "buffers",
    "planning",
    "policies",
    "checks",
    "batches",
    "learner",
    "growth",
    "task_stats",
    "m3po",
    "envs/action_repeat",
    "envs/suites",
    "envs/padding",
    "envs/vec_env",
    "envs/single",
    "envs/adapter",
    "envs/__init__",
    "evaluation",
    "callbacks",
    "plotting",
    "zoo",
    "_zoo_hook",
    "__init__",
]
MAX_LINES = {"m3po": 580, "_zoo_hook": 39}


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def imported_from_here(name: str) -> Iterator[str]:
    """:return: Names of the package's own files that a file imports"""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = f"sb3_m3po.{module}".rstrip(".")
            if module == "sb3_m3po":
                yield from (alias.name for alias in node.names)
            elif module == "sb3_m3po.envs":
                yield "envs/__init__"
            elif module.startswith("sb3_m3po."):
                yield module.partition(".")[2].replace(".", "/")
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.partition(".")[0] == "sb3_m3po")


def test_every_file_has_its_place() -> None:
    assert sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")) == sorted(ORDER)


def test_the_documentation_has_them_in_this_order() -> None:
    lines = (PACKAGE.parent / "docs" / "api.md").read_text(encoding="utf-8").splitlines()
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    public = [name for name in ORDER if not name.rpartition("/")[2].startswith("_")]
    assert headings == [f"sb3_m3po.{name.replace('/', '.')}" for name in public]


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    assert set(imported_from_here(name)) <= above


@pytest.mark.parametrize("name", ORDER)
def test_files_stay_short(name: str) -> None:
    lines = (PACKAGE / f"{name}.py").read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES.get(name, 460)


def functions(node: ast.AST) -> Iterator[ast.FunctionDef]:
    return (child for child in ast.walk(node) if isinstance(child, ast.FunctionDef))


@pytest.mark.parametrize("name", ORDER)
def test_functions_stay_short(name: str) -> None:
    def body_lines(function: ast.FunctionDef) -> int:
        first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
        return (function.end_lineno or first.lineno) - first.lineno + 1

    long = {function.name: body_lines(function) for function in functions(tree(name)) if body_lines(function) > 70}
    assert not long


def undocumented(node: ast.Module | ast.ClassDef, bases: frozenset[str] = frozenset()) -> Iterator[str]:
    """:return: Public classes and functions without a docstring; an override has that of its base class"""
    for child in node.body:
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef)) or child.name.startswith("_"):
            continue
        if ast.get_docstring(child) is None and child.name not in bases:
            yield child.name
        if isinstance(child, ast.ClassDef):
            yield from (f"{child.name}.{name}" for name in undocumented(child, inherited(child)))


def inherited(node: ast.ClassDef) -> frozenset[str]:
    """:return: Names that the bases of a class of this package define"""
    for name in ORDER[:-1]:
        module = importlib.import_module(f"sb3_m3po.{name}".replace("/", ".").removesuffix(".__init__"))
        cls = getattr(module, node.name, None)
        if inspect.isclass(cls) and cls.__module__ == module.__name__:
            return frozenset(attribute for base in cls.__mro__[1:] for attribute in vars(base))
    return frozenset()


@pytest.mark.parametrize("name", ORDER)
def test_public_names_are_documented(name: str) -> None:
    assert ast.get_docstring(tree(name)), "the file itself"
    assert list(undocumented(tree(name))) == []


@pytest.mark.parametrize("name", ["M3PO", "WorldModelPolicy"])
def test_every_argument_is_documented(name: str) -> None:
    cls = getattr(sb3_m3po, name)
    missing = [p for p in list(inspect.signature(cls.__init__).parameters)[1:] if f":param {p}:" not in (cls.__doc__ or "")]
    assert missing == []


@pytest.mark.parametrize("name", [name for name in ORDER if not name.endswith("__init__")])
def test_everything_is_typed(name: str) -> None:
    def untyped(function: ast.FunctionDef) -> bool:
        arguments = [*function.args.args, *function.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        return bool(bare) or (function.returns is None and function.name != "__init__")

    assert [function.name for function in functions(tree(name)) if untyped(function)] == []


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    environment_root = str(PACKAGE.parent)
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=environment_root).stdout


def test_importing_imports_no_extra() -> None:
    extras = (
        "rl_zoo3",
        "optuna",
        "minigrid",
        "dm_control",
        "shimmy",
        "metaworld",
        "mujoco",
        "ray",
        "sb3_contrib",
        "moviepy",
        "matplotlib",
        "rliable",
    )
    code = f"import sys, sb3_m3po; print([name for name in {extras!r} if name in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_importing_leaves_the_global_settings_alone() -> None:
    code = (
        "import torch as th, numpy as np; before = (th.get_num_threads(), th.get_default_dtype(), th.get_rng_state().sum()); "
        "import sb3_m3po; print(before == (th.get_num_threads(), th.get_default_dtype(), th.get_rng_state().sum()))"
    )
    assert run_python(code).strip() == "True"


def test_public_names() -> None:
    assert sorted(sb3_m3po.__all__) == sorted(set(sb3_m3po.__all__))
    assert all(hasattr(sb3_m3po, name) for name in sb3_m3po.__all__)
    assert sb3_m3po.__version__.count(".") >= 1
    assert (PACKAGE / "py.typed").exists()
