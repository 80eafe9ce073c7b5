"""``mbdpo tasks``: the paper's tasks, their sizes, what is installed; and a trial of them."""

import argparse
from collections.abc import Sequence

from sb3_mbdpo.suites.catalogue import SUITES, TASK_SETS, SuiteEntry, suite_entry, suite_of, task_set_names
from sb3_mbdpo.suites.checking import check_task
from sb3_mbdpo.zoo_checks import BadInputError

HEADERS = ("id", "observations", "actions", "decisions", "pixels", "suite", "installed")


def tasks(arguments: Sequence[str]) -> int:
    """
    :param arguments: command line arguments
    :return: exit code, 1 if a task that was tried out failed
    """
    parser = argparse.ArgumentParser(prog="mbdpo tasks", description="List the paper's tasks, or try them out.")
    parser.add_argument("names", nargs="*", help=f"tasks, or sets: {', '.join(TASK_SETS)}; all suites by default")
    parser.add_argument("--installed", action="store_true", help="only tasks whose package is installed")
    parser.add_argument("--check", action="store_true", help="Gymnasium's checker and an episode of random decisions")
    parser.add_argument("--pixels", action="store_true", help="try out the variants that are seen")
    args = parser.parse_args(list(arguments))
    try:
        entries = find_entries(args.names)
    except ValueError as error:
        raise BadInputError(str(error)) from error
    if args.installed:
        entries = [entry for entry in entries if entry.suite.installed]
    if args.pixels and not args.check:
        raise BadInputError("--pixels says what --check tries out: add it.")
    if args.check:
        return try_out(entries, args.pixels)
    print(format_table([row(entry) for entry in entries]))
    for suite in SUITES.values():
        if not suite.installed:
            print(f"{suite.title}: {suite.install_command}")
    return 0


def find_entries(names: Sequence[str]) -> list[SuiteEntry]:
    """
    :param names: names of tasks and of sets; none for all suites
    :return: the tasks, each once
    :raises ValueError: for an unknown name
    """
    chosen: list[str] = []
    for name in names or SUITES:
        chosen += task_set_names(name) if name in TASK_SETS else [name]
    for task in chosen:
        suite_of(task)
    return [suite_entry(task) for task in dict.fromkeys(chosen)]


def row(entry: SuiteEntry) -> tuple[str, ...]:
    """
    :param entry: a task
    :return: its line of the table
    """
    sizes = (str(entry.observation_dim or "?"), str(entry.action_dim or "?"))
    pixels = "yes" if entry.pixels_id else ""
    installed = "yes" if entry.suite.installed else "no"
    return (entry.env_id, *sizes, str(entry.decisions), pixels, entry.suite.title, installed)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """
    :param rows: lines of the table
    :return: the table as text, under its headers
    """
    lines = [HEADERS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADERS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def try_out(entries: Sequence[SuiteEntry], pixels: bool = False) -> int:
    """
    :param entries: tasks
    :param pixels: take the variants that are seen, of the tasks that have one
    :return: 1 if one of them failed, and 0
    """
    failed = 0
    ids = [env_id for entry in entries if (env_id := entry.pixels_id if pixels else entry.env_id)]
    for env_id in ids:
        try:
            checked = check_task(env_id)
        except Exception as error:  # noqa: BLE001 (one task must not keep the others from being tried)
            failed += 1
            print(f"{env_id}: FAILED: {type(error).__name__}: {error}", flush=True)
        else:
            remarks = "".join(f"; {remark}" for remark in checked.warnings)
            done = f"{checked.decisions} decisions, return {checked.total:.1f}, {checked.seconds:.1f} s"
            print(f"{env_id}: {done}{remarks}", flush=True)
    print(f"{len(ids) - failed} of {len(ids)} tasks passed")
    return int(failed > 0)
