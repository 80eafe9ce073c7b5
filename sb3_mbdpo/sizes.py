"""Parameter counts of the model sizes. ``python -m sb3_mbdpo.sizes`` prints them.

How the paper counts follows from its smallest and largest multi-task model, 1.7M and 340M: encoder, dynamics, reward,
critics, prior, energy and task embeddings, without target critics (copies), the termination head (its tasks do not
terminate) and the score network (off by default). Counted so, the multi-task sizes 1 and 317 have 1.66M and 340.2M.
"""

import argparse
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_mbdpo.encoders import StateEncoder
from sb3_mbdpo.presets import MODEL_SIZES
from sb3_mbdpo.world_model import TaskSpec, WorldModel

# The widest of TD-MPC2's 80 tasks: observation entries and actions
MULTITASK_WIDTHS = (39, 6)
MULTITASK_TASKS = 80
PAPER_SIZES = (1, 5, 19, 48, 317)
NOT_IN_THE_PAPERS_COUNT = ("target_critics", "termination", "score")


class SizeCount(NamedTuple):
    """
    Parameters of one size: ``total`` as the paper counts, ``trained`` with termination head and score network too,
    ``stored`` with the target critics as well; ``modules`` by name.
    """

    model_size: float
    total: int
    trained: int
    stored: int
    modules: dict[str, int]


def count_parameters(
    model_size: float, observation_dim: int = 39, action_dim: int = 6, n_tasks: int = 80, embedding_dim: int = 96
) -> SizeCount:
    """
    Count without allocating: the model is built on the meta device.

    >>> round(count_parameters(1).total / 1e6, 1), round(count_parameters(317).total / 1e6)
    (1.7, 340)

    :param model_size: Key of the size table
    :param observation_dim: Width of the (padded) observation vector
    :param action_dim: Number of (padded) actions
    :param n_tasks: Number of tasks; 0 for a single-task model
    :param embedding_dim: Width of the task embeddings
    :return: Counts
    :raises ValueError: for a size that is not in the table
    """
    model = shapes_of(model_size, observation_dim, action_dim, n_tasks, embedding_dim)
    modules = {name: _count(module) for name, module in model.named_children()}
    modules = {name: count for name, count in modules.items() if count}
    stored = sum(modules.values())
    total = stored - sum(modules[name] for name in NOT_IN_THE_PAPERS_COUNT)
    return SizeCount(model_size, total, stored - modules["target_critics"], stored, modules)


def shapes_of(
    model_size: float, observation_dim: int = 39, action_dim: int = 6, n_tasks: int = 80, embedding_dim: int = 96
) -> WorldModel:
    """
    A world model of shapes alone, on the meta device: nothing is allocated. Arguments and errors are those of
    :func:`count_parameters`.

    :return: The model
    """
    if model_size not in MODEL_SIZES:
        raise ValueError(f"model_size must be one of {sorted(MODEL_SIZES)}, got {model_size!r}.")
    size, task_dim = MODEL_SIZES[model_size], embedding_dim if n_tasks else 0
    tasks = TaskSpec([action_dim] * n_tasks, embedding_dim) if n_tasks else None
    with th.device("meta"):
        widths = [size.enc_dim] * max(size.num_enc_layers - 1, 1)
        encoder = StateEncoder(observation_dim, widths, size.latent_dim, task_dim=task_dim)
        return WorldModel(
            encoder, size.latent_dim, action_dim, [size.mlp_dim] * 2, size.n_critics, num_bins=101, tasks=tasks
        )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def size_table(
    observation_dim: int = 39, action_dim: int = 6, n_tasks: int = 80, sizes: tuple[float, ...] = PAPER_SIZES
) -> str:
    """
    :param observation_dim: Width of the (padded) observation vector
    :param action_dim: Number of (padded) actions
    :param n_tasks: Number of tasks; 0 for single-task models
    :param sizes: Keys of the size table
    :return: A table in millions of parameters
    """
    lines = [f"{'size':>6} {'parameters':>11} {'trained':>9} {'stored':>9}   largest modules (millions)"]
    for size in sizes:
        count = count_parameters(size, observation_dim, action_dim, n_tasks)
        parts = sorted(count.modules.items(), key=lambda item: -item[1])[:4]
        largest = ", ".join(f"{name} {number / 1e6:.2f}" for name, number in parts)
        numbers = f"{count.total / 1e6:>11.2f} {count.trained / 1e6:>9.2f} {count.stored / 1e6:>9.2f}"
        lines.append(f"{size:>6g} {numbers}   {largest}")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Parameter counts of the model sizes, in millions.")
    parser.add_argument("--observations", type=int, default=MULTITASK_WIDTHS[0], help="width of the observation vector")
    parser.add_argument("--actions", type=int, default=MULTITASK_WIDTHS[1], help="number of actions")
    parser.add_argument("--tasks", type=int, default=MULTITASK_TASKS, help="number of tasks, 0 for a single-task model")
    parser.add_argument("--all", action="store_true", help="with the small sizes for classic control")
    arguments = parser.parse_args()
    sizes = tuple(sorted(MODEL_SIZES)) if arguments.all else PAPER_SIZES
    print(size_table(arguments.observations, arguments.actions, arguments.tasks, sizes))
    print("parameters: as the paper counts, without target critics, termination head and score network")


if __name__ == "__main__":
    main()
