"""
Run the tests of the installed stable_baselines3 and sb3_contrib, unedited, on M3PO.

    python tests/conformance/run.py                 all of them
    python tests/conformance/run.py -k test_run     arguments are pytest's
    python tests/conformance/run.py --record        on the originals: write trains.txt, the cases in which they learn
"""

import os
import shutil
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / ".conformance"
SUITE, RESULTS = WORK / "suite", WORK / "results.xml"
#: The folder in the suite, by the package whose tests it holds
PACKAGES = {"stable_baselines3": "sb3", "sb3_contrib": "contrib"}
MIN_PASSED = 150


def source_of(package: str) -> Path:
    """
    Download the source distribution of the installed version, unless it is there.

    :param package: Name of the package
    :return: The unpacked folder
    """
    name = f"{package}-{version(package)}"
    if not (WORK / name).is_dir():
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(WORK)]
        command = [sys.executable, "-m", "pip", "download", *options, f"{package}=={version(package)}"]
        subprocess.run(command, check=True)
        with tarfile.open(WORK / f"{name}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
    return WORK / name


def make_suite() -> Path:
    """
    Lay the tests of both packages out, with our conftest.py beside them.

    :return: The file with Stable-Baselines3's own settings of pytest
    """
    shutil.rmtree(SUITE, ignore_errors=True)
    for package, folder in PACKAGES.items():
        shutil.copytree(source_of(package) / "tests", SUITE / folder)
        # Files of one name in both folders need packages around them
        (SUITE / folder / "__init__.py").touch()
    shutil.copy(HERE / "conftest.py", SUITE)
    return source_of("stable_baselines3") / "pyproject.toml"


def run_pytest(settings: Path, reference: bool, arguments: list[str]) -> None:
    """
    :param settings: A pyproject.toml
    :param reference: Whether to run the original algorithms
    :param arguments: Further arguments of pytest
    """
    options = ["-c", str(settings), "--rootdir", str(SUITE), "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal"]
    output = ["-q", "-rs", "--tb=short", "--durations=10", f"--junitxml={RESULTS}"]
    environment = {
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "CONFORMANCE_REFERENCE": str(int(reference)),
    }
    command = [sys.executable, "-m", "pytest", *options, *output, *arguments, str(SUITE)]
    RESULTS.unlink(missing_ok=True)
    subprocess.run(command, cwd=SUITE, env=environment, check=False)


def outcome_of(case: ElementTree.Element) -> str:
    """:return: passed, failed, not applicable or skipped"""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skipped = case.find("skipped")
    if skipped is None:
        return "passed"
    return "not applicable" if "not applicable" in skipped.get("message", "") else "skipped"


def properties_of(case: ElementTree.Element) -> dict[str, str]:
    """:return: What conftest.py noted down about a case"""
    return {p.get("name", ""): p.get("value", "") for p in case.iter("property")}


def record(cases: list[ElementTree.Element]) -> int:
    """Write the list of the cases in which the original algorithms learn."""
    noted = [properties_of(case) for case in cases if outcome_of(case) == "passed"]
    trains = sorted(case["case"] for case in noted if int(case["updates"]) > 0)
    head = f"# Cases in which PPO, A2C or TRPO make updates, as `run.py --record` finds them: {len(trains)} of {len(cases)}\n"
    (HERE / "trains.txt").write_text(head + "\n".join(trains) + "\n", encoding="utf-8")
    print(f"{len(trains)} cases that train, of {len(cases)}")
    return 0


def report(cases: list[ElementTree.Element], seconds: float) -> int:
    """
    Print what came out.

    :param cases: Of the results of pytest
    :param seconds: How long it took
    :return: The exit code
    """
    counts = Counter(outcome_of(case) for case in cases)
    updates = sum(int(properties_of(case).get("updates", 0)) for case in cases)
    failed = {properties_of(case).get("case", "?") for case in cases if outcome_of(case) == "failed"}
    print()
    for case in sorted(failed):
        print(f"FAILED {case}")
    print(f"M3PO made {updates} updates in {len(cases)} cases and {seconds:.0f} s")
    print(f"{counts['not applicable']} cases can't apply (not_applicable.txt), {counts['skipped']} skipped themselves")
    if counts["passed"] < MIN_PASSED:
        print(f"Fewer than {MIN_PASSED} passed")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['not applicable'] + counts['skipped']} skipped")
    return int(bool(failed) or counts["passed"] < MIN_PASSED)


def main(arguments: list[str]) -> int:
    """:return: The exit code"""
    start, reference = time.monotonic(), "--record" in arguments
    WORK.mkdir(exist_ok=True)
    run_pytest(make_suite(), reference, [argument for argument in arguments if argument != "--record"])
    if not RESULTS.exists():
        print("pytest could not run")
        return 1
    cases = list(ElementTree.parse(RESULTS).iter("testcase"))
    return record(cases) if reference else report(cases, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
