"""Processes of their own: commands, and groups as torchrun would start them; forked from one that has imported all."""

import contextlib
import io
import multiprocessing as mp
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th

from sb3_mbdpo import MBDPO
from sb3_mbdpo.distributed import process_group
from sb3_mbdpo.offline_commands import pretrain
from sb3_mbdpo.ranks import Ranks
from sb3_mbdpo.shards import ShardedDataset
from tests.episodes import numbered, write

PATIENCE = 120
CONTEXT = mp.get_context("forkserver")
# Collectives are kept out of compiled graphs, by what imports the whole compiler. What is not installed is passed over
CONTEXT.set_forkserver_preload(["tests.processes", "torch._dynamo", "rl_zoo3.exp_manager"])


def launch(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """
    Call a function of this or another module in several processes.

    :param function: Called with the arguments, in torchrun's environment
    :param size: Number of processes
    :return: What it returned in each, None in those that died
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receivers, processes = [], []
    for rank in range(size):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_run, args=(rank, size, port, sender, function, arguments))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    results = []
    for receiver, process in zip(receivers, processes, strict=True):
        assert receiver.poll(PATIENCE), "a process hangs"
        with contextlib.suppress(EOFError):
            results.append(receiver.recv())
            process.join(PATIENCE)
            continue
        results.append(None)
    return results


def _run(
    rank: int, size: int, port: int, sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    th.set_num_threads(1)
    warnings.simplefilter("ignore")
    sender.send(function(*arguments))


def run_module(
    module: str, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 600
) -> "subprocess.CompletedProcess[str]":
    """
    ``python -m``, without the seconds that imports take.

    :param module: Module to run
    :param arguments: Its command line
    :param cwd: Where it runs; by default here
    :param env: All variables of its environment; by default those of this process
    :param timeout: Seconds until it is killed
    :return: Exit code and output
    :raises subprocess.TimeoutExpired: if it was killed
    """
    command = [module, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        values = dict(os.environ if env is None else env)
        process = CONTEXT.Process(target=_run_module, args=(command, str(cwd or Path.cwd()), values, files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))


def _run_module(command: list[str], cwd: str, env: dict[str, str], files: list[Path]) -> None:
    os.environ.clear()
    os.environ |= env
    os.chdir(cwd)
    for stream, file in enumerate(files, 1):
        target = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(target, stream)
        os.close(target)
    th.set_num_threads(int(env.get("OMP_NUM_THREADS", th.get_num_threads())))
    sys.argv, sys.orig_argv = command, [sys.executable, "-m", *command]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


# --- what the processes do --------------------------------------------------------------------------------------------


def toy_shards(path: Path, n_tasks: int = 1) -> Path:
    return write(path, numbered(n_tasks=n_tasks), n_tasks=n_tasks)


def toy_model(data: Path, **kwargs: Any) -> MBDPO:
    values: dict[str, Any] = {"preset": "debug", "buffer_size": 100, "batch_size": 24, "seed": 0, "device": "cpu"}
    return MBDPO.from_minari(ShardedDataset(data), **(values | kwargs))


def learn(data: Path, saved: Path, steps: int, kwargs: dict[str, Any]) -> bool:
    """Learn together; returns whether this process has said anything while learning."""
    with process_group(1) as ranks:
        # It says itself what device it is on
        model = toy_model(data, **kwargs)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            model.learn_offline(ShardedDataset(data), steps, log_interval=2, ranks=ranks)
        if ranks.is_main:
            model.save(saved)
    return bool(said.getvalue())


def command(arguments: list[str]) -> tuple[int, str]:
    """Exit code and errors of ``mbdpo pretrain``."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = pretrain(arguments)
    return code, errors.getvalue()


def messages(cases: list[Callable[[Ranks], Any]], *arguments: Any) -> list[str]:
    """What is raised by each of several functions in turn."""
    found = []
    with process_group(1) as ranks:
        for case in cases:
            try:
                case(ranks, *arguments)
                found.append("nothing")
            except (ValueError, RuntimeError, OSError) as error:
                found.append(f"{type(error).__name__}: {error}")
    return found
