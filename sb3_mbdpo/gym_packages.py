"""Environments of one's own on the command line: ``--gym-packages``, as in rl_zoo3's train and enjoy."""

import argparse
import importlib
from collections.abc import Iterable

from sb3_mbdpo.zoo_checks import BadInputError

OPTION = "--gym-packages"


def add_packages_argument(parser: argparse.ArgumentParser) -> None:
    """
    :param parser: Parser that gets ``--gym-packages``
    """
    parser.add_argument(OPTION, nargs="+", default=[], help="modules to import that register environments")


def import_packages(names: Iterable[str]) -> None:
    """
    Import what registers environments.

    :param names: Modules
    :raises BadInputError: for one that there is not
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise BadInputError(
                f"{OPTION} {name}: {error}. It is looked for where Python looks for modules; for a file in this "
                "folder: PYTHONPATH=. mbdpo ..., or python -m sb3_mbdpo ..."
            ) from error


def without_packages(arguments: Iterable[str]) -> list[str]:
    """
    >>> without_packages(["--env", "Own-v0", "--gym-packages", "own", "other", "-n", "10"])
    ['--env', 'Own-v0', '-n', '10']

    :param arguments: Arguments of a program that has no such option
    :return: The same without it and its values
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_packages_argument(parser)
    return parser.parse_known_args(list(arguments))[1]
