"""
Run the whole table, the longest runs first; the same command goes on after a kill.

``nice -n 10 python -m benchmarks.suite --jobs 2``
"""

import argparse
import sys

from benchmarks.run import add_settings_arguments, run_commands, settings_options
from benchmarks.targets import TARGETS


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=[target.env_id for target in TARGETS], help="some of the table's rows")
    add_settings_arguments(parser)
    args = parser.parse_args(argv)
    targets = [target for target in TARGETS if target.env_id in args.envs]
    if unknown := set(args.envs) - {target.env_id for target in targets}:
        parser.error(f"not in the table: {sorted(unknown)}")
    runs = [(target, seed) for target in targets for seed in args.seeds]
    runs.sort(key=lambda run: run[0].until * run[0].cost, reverse=True)
    options = settings_options(args)
    commands = [
        ["benchmarks.run", "--env", target.env_id, "--steps", str(target.until), "--seeds", str(seed), *options]
        for target, seed in runs
    ]
    sys.exit(min(run_commands(commands, args.jobs), 1))


if __name__ == "__main__":
    main()
