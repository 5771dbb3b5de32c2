"""
Run whole suites, the longest runs first; the same command goes on after a kill. Says before it starts how long it will take.

``nice -n 10 python -m benchmarks.suite table --jobs 2`` runs the rows of ``benchmarks.table``,
``python -m benchmarks.suite classic mujoco dmc --seeds 0 1 2 3 4 --name 100k`` the suites that ``benchmarks.report`` compares.
"""

import argparse
import sys

from benchmarks.run import add_settings_arguments, is_done, run_commands, settings_options
from benchmarks.suites import SUITES, budgets, core_hours


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", default=["table"], help=f"some of table, {', '.join(SUITES)}, off-policy")
    parser.add_argument("--envs", nargs="+", help="some of their environments")
    parser.add_argument("--dry-run", action="store_true", help="only say how long it will take")
    add_settings_arguments(parser)
    args = parser.parse_args(argv)
    if unknown := set(args.suites) - {"table", *SUITES, "off-policy"}:
        parser.error(f"unknown suites {sorted(unknown)}: there are table, {', '.join(SUITES)} and off-policy")
    steps = {env_id: n for suite in args.suites for env_id, n in budgets(suite, args.algo, args.zoo).items()}
    if unknown := set(args.envs or ()) - set(steps):
        parser.error(f"not in {', '.join(args.suites)}: {sorted(unknown)}")
    if args.suites != ["table"] and not (args.zoo or args.name or args.dry_run):
        parser.error("these budgets are not the table's, whose rows would be overwritten: give --name 100k")
    if args.suites == ["table"] and args.zoo and not args.name:
        parser.error("these budgets are not the suites', whose rows would be overwritten: give --name zoo-table")
    runs = [(env_id, seed) for env_id in args.envs or steps for seed in args.seeds]
    hours = {env_id: core_hours(args.algo, env_id, n) for env_id, n in steps.items()}
    runs.sort(key=lambda run: hours[run[0]], reverse=True)
    options, commands = settings_options(args), {}
    for env_id, seed in runs:
        command = ["--env", env_id, "--steps", str(steps[env_id]), "--seeds", str(seed), *options]
        if not is_done(command):
            commands[env_id, seed] = ["benchmarks.run", *command]
    print(
        f"{len(commands)} runs, about {sum(hours[env_id] for env_id, _ in commands):.1f} core-hours of training "
        f"({len(runs) - len(commands)} are done)",
        flush=True,
    )
    if args.dry_run:
        return
    sys.exit(min(run_commands(list(commands.values()), args.jobs), 1))


if __name__ == "__main__":
    main()
