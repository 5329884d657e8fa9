# SPDX-License-Identifier: Apache-2.0
"""Two processes that work together, as torchrun starts them, but forked: nothing is imported anew."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

PROCESSES = 2
Work = Callable[[int], None]


@dataclass(frozen=True)
class Ended:
    """What a process has written, and its exit code."""

    said: str
    code: int | None


def run_together(folder: Path, work: Work) -> list[Ended]:
    """Run ``work`` in all processes, each with its rank, in ``folder``."""
    with started(folder, work) as processes:
        return ended(folder, processes)


@contextmanager
def started(folder: Path, work: Work) -> Iterator[list[BaseProcess]]:
    """They run inside, and are killed at the end."""
    port, context = free_port(), multiprocessing.get_context("fork")
    processes: list[BaseProcess] = [
        context.Process(target=_process, args=(rank, port, folder, work)) for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def ended(folder: Path, processes: list[BaseProcess]) -> list[Ended]:
    """Wait for the processes."""
    for process in processes:
        process.join(120)
    return [
        Ended((folder / f"said.{rank}").read_text(), process.exitcode)
        for rank, process in enumerate(processes)
    ]


def free_port() -> int:
    """For the processes to meet at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _process(rank: int, port: int, folder: Path, work: Work) -> None:
    os.chdir(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = sys.stderr = (folder / f"said.{rank}").open("w", buffering=1)
    work(rank)
