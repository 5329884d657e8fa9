# SPDX-License-Identifier: Apache-2.0
"""Several processes that compile together, as torchrun starts them: one on each GPU, all with the same command.

They all run the same compiler. The first process alone holds the outputs, decides which stages run, writes the log and
speaks; in the stages that are shared out each does its ``share``, and then the others are done. What they tell each
other goes through torchrun's store, where one that waits sees at once that another has failed; a wait has no limit
otherwise, for a stage takes as long as it takes. Tensors go through NCCL between GPUs, and through gloo.

Without torchrun there is one process, which is the first, has all of everything and waits for nobody.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lynx_compile.errors import InputError, LynxError

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 0.02
LONGEST_SUM = timedelta(
    hours=1
)  # all processes are there when it begins; one of them writes files in between
T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Process:
    """``rank`` of ``count``. ``said``: how many messages of each topic this process has given or taken."""

    rank: int = 0
    count: int = 1
    store: Any = None
    said: Counter[str] = field(default_factory=Counter)


_here = _Process()


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, has started several processes."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and os.environ["WORLD_SIZE"] != "1"


@contextmanager
def joined() -> Iterator[None]:
    """The processes that were launched are one company inside, each on its own GPU. An error in one ends all.

    Raises:
        InputError: there are more processes than GPUs. LynxError: another process has failed; its error, told here.
    """
    global _here
    if not launched():
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://"))
    _here = _Process(rank, count, store)
    try:
        _take_gpu()
        yield
    except BaseException as error:
        _tell_failure(error)
        raise
    finally:
        _here = _Process()


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _here.rank == 0


def is_alone() -> bool:
    """Whether nothing is shared out."""
    return _here.count == 1


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the items: every so manieth, so that what lies together is spread over all."""
    return items[_here.rank :: _here.count]


@contextmanager
def alone() -> Iterator[None]:
    """Inside there is this process only, which must be the first: nothing is shared out, and nobody is waited for."""
    global _here
    company, _here = _here, _Process()
    try:
        yield
    finally:
        _here = company


@contextmanager
def first_process_first() -> Iterator[None]:
    """The others come into the block when the first process has left it, and find what it has made."""
    if not is_first():
        hear("made")
    yield
    if is_first():
        tell("made", "")


def meet() -> None:
    """Wait until all processes are here.

    Raises:
        LynxError: one of them has failed.
    """
    if _here.count == 1:
        return
    key = _next("met")
    if _here.store.add(key, 1) == _here.count:
        _here.store.set(f"{key}/all", "")
    _wait_for(f"{key}/all")


def tell(topic: str, message: str) -> None:
    """Say something that the others ``hear``, in this order, whenever they come to it."""
    if _here.count > 1:
        _here.store.set(_next(topic), message)


def hear(topic: str) -> str:
    """The next message of the topic.

    Raises:
        LynxError: a process has failed before it said so.
    """
    key = _next(topic)
    _wait_for(key)
    message: bytes = _here.store.get(key)
    return message.decode()


def raise_if_failed() -> None:
    """End this process where another has failed; for loops that take long.

    Raises:
        LynxError: the other process's error.
    """
    if _here.count == 1 or not _is_there("lynx failure"):
        return
    failure = json.loads(_here.store.get("lynx failure"))
    error = LynxError(failure["cause"], failure["remedy"])
    error.exit_code = failure["exit_code"]
    log.info("process %d of %d failed: %s", failure["rank"], _here.count, failure["traceback"])
    raise error


@contextmanager
def adding_up() -> Iterator[Callable[[torch.Tensor], None]]:
    """Yields what replaces a tensor by its sum over all processes, which call it for the same tensors in one order.

    Raises:
        LynxError: a process has failed before.
    """
    meet()
    if _here.count == 1:
        yield lambda tensor: None
        return
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(_next("sum"), _here.store),  # type: ignore[attr-defined]
        rank=_here.rank, world_size=_here.count, timeout=LONGEST_SUM,
    )  # fmt: skip

    def all_reduce(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)

    yield all_reduce
    dist.destroy_process_group()  # together: NCCL waits for the others here


def _take_gpu() -> None:
    """torch's current GPU is this process's own from now on."""
    import torch

    local, there = int(os.environ.get("LOCAL_RANK", _here.rank)), torch.cuda.device_count()
    if local < there:
        torch.cuda.set_device(local)
    elif there:
        raise InputError(
            f"Process {local} of this machine has no GPU of its own: there are {there}.",
            f"Start one process a GPU: torchrun --nproc-per-node {there}.",
        )


def _tell_failure(error: BaseException) -> None:
    """Leave word of an error, unless another process has failed before."""
    known = error if isinstance(error, LynxError) else None
    if known is None:
        known = LynxError(f"Process {_here.rank} ended with {type(error).__name__}: {error}.", "See the log.")
    failure = {
        "rank": _here.rank,
        "cause": known.cause,
        "remedy": known.remedy,
        "exit_code": known.exit_code,
        "traceback": "".join(traceback.format_exception(error)),
    }
    with suppress(RuntimeError):  # the store is gone with its process
        _here.store.compare_set("lynx failure", "", json.dumps(failure))


def _next(topic: str) -> str:
    """The key of the topic's next message."""
    _here.said[topic] += 1
    return f"lynx {topic}/{_here.said[topic]}"


def _wait_for(key: str) -> None:
    while not _is_there(key):
        raise_if_failed()
        time.sleep(POLL_SECONDS)


def _is_there(key: str) -> bool:
    try:
        found: bool = _here.store.check([key])
    except RuntimeError:  # it is the first process's where no launcher holds it
        raise LynxError("The first process has ended.", "See what it has written.") from None
    return found
