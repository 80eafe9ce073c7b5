"""The processes that torchrun has started, and their connection."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch as th
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from sb3_mbdpo.ranks import ALONE, Ranks, contact

# What torchrun tells each process
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Longer than an evaluation, during which all wait for the first process
TIMEOUT_MINUTES = 30.0


@contextmanager
def process_group(timeout_minutes: float = TIMEOUT_MINUTES) -> Iterator[Ranks]:
    """
    Join the processes that torchrun has started; without torchrun, or with one process, there is nothing to join.

    On hosts with GPUs each process takes the one of its local rank as "cuda".

    :param timeout_minutes: How long a process waits for the others before it gives up; longer than an evaluation or a
        save takes, which the first process does alone
    :return: The processes
    :raises ValueError: if torchrun's environment is incomplete, or a host has fewer GPUs than processes
    :raises LostProcessError: if the others cannot be reached
    """
    ranks = launched_ranks()
    if ranks.size == 1:
        yield ranks
        return
    backend = "gloo"
    if th.cuda.is_available():
        local, processes, devices = int(os.environ[VARIABLES[2]]), os.environ[VARIABLES[3]], th.cuda.device_count()
        if local >= devices:
            raise ValueError(f"{processes} processes on a host with {devices} GPUs: pass --nproc-per-node {devices}.")
        th.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(minutes=timeout_minutes)
    with contact(ranks):
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        # torchrun's agent keeps the store when it starts processes anew: addresses of the last ones are still in it
        attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size}"
        store = dist.PrefixStore(attempt, store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    # After an error the connections end with the process: closing them could wait for those who are gone
    yield ranks
    dist.destroy_process_group()


def launched_ranks() -> Ranks:
    """
    :return: What torchrun says of this process; alone without torchrun
    :raises ValueError: if its environment is incomplete
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if not ({"RANK", "WORLD_SIZE"} & os.environ.keys()) or os.environ.get("WORLD_SIZE") == "1":
        return ALONE
    if missing:
        raise ValueError(f"The environment has RANK or WORLD_SIZE, but not {', '.join(missing)}: start with torchrun.")
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def is_restarted() -> bool:
    """Whether torchrun has started the processes anew after one had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
