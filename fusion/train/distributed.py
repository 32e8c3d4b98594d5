"""The processes of a training: one, several on this host, or those that torchrun has started."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
from lightning_fabric import Fabric
from torch import distributed
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from common.errors import ConfigError, TaggingError, WorkerDied, one_line
from common.precision import Precision, resolve_precision, set_threads
from config.train import TrainerSettings

Result = TypeVar("Result")

_FABRIC_PRECISION: Mapping[Precision, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}
_PEER_LOST = 75  # exit status of a process that ends only because another one has
_OWN_RUN = "insighttag"
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_GONE = ("closed by peer", "reset by peer", "gloo", "NCCL", "Broken pipe", "TCPStore")


def run(settings: TrainerSettings, work: Callable[[Fabric], Result]) -> Result:
    """Do ``work`` in as many processes as the settings name, and give what the first one gave.

    Args:
        settings: Of the trainer.
        work: Is pickled where there are several processes; they all call it.

    Raises:
        ConfigError: There are not as many GPUs.
        TaggingError: What ``work`` raises, in whichever process it was.
        WorkerDied: A process was killed.
    """
    if under_torchrun():
        return _joined(settings, work)
    gpus = _gpus(settings)
    processes = gpus or settings.processes
    if processes == 1:
        return work(_fabric(settings, gpus=gpus, local=1, hosts=1))
    return _spawned(settings, work, processes)


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return distributed.is_torchelastic_launched()


def on_this_host() -> int:
    """Processes of this training on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def agree(fabric: Fabric, work: Callable[[], Result]) -> Result:
    """Do ``work`` in every process, and go on only when it went well in all.

    Raises:
        TaggingError: The first process's that failed, in every process.
    """
    if fabric.world_size == 1:
        return work()
    found: Result | None = None
    problem: TaggingError | None = None
    try:
        found = work()
    except TaggingError as error:
        problem = error
    problems: list[TaggingError | None] = [None] * fabric.world_size
    distributed.all_gather_object(problems, problem)
    for raised in problems:
        if raised is not None:
            raise same_everywhere(raised)
    return cast("Result", found)


def same_everywhere(error: TaggingError) -> BaseException:
    """What to raise for a mistake that every process meets: one of them speaks of it."""
    return error if _speaks() else SystemExit(2)


def gathered(fabric: Fabric, value: Result) -> list[Result]:
    """The values of all processes, in their order."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    distributed.all_gather_object(values, value)
    return values


# One host --------------------------------------------------------------------------------------


def _spawned(settings: TrainerSettings, work: Callable[[Fabric], Result], count: int) -> Result:
    # It tells which processes it ends; what matters is which one was the first.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    said = multiprocessing.get_context("spawn").SimpleQueue()
    place = {  # as torchrun tells its processes where they are
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "TORCHELASTIC_RUN_ID": _OWN_RUN,
    }
    context = start_processes(  # type: ignore[no-untyped-call]
        _process, (settings, work, place, said), nprocs=count, join=False
    )
    try:
        while not context.join(timeout=0.5, grace_period=5):
            # What a process says is read while it runs: a full pipe would hold it.
            if not said.empty():
                kind, value = said.get()
                break
        else:
            kind, value = said.get()
        if kind == "done":
            while not context.join(grace_period=5):
                pass
            return cast("Result", value)
    except ProcessExitedException as error:
        if said.empty():
            raise _lost(settings, context.processes, error) from error
        kind, value = said.get()
    finally:
        _end(context.processes)
    raise cast("TaggingError", value)


def _process(
    rank: int,
    settings: TrainerSettings,
    work: Callable[[Fabric], Any],
    place: dict[str, str],
    said: Any,
) -> None:
    # Dies with the process that started it, however that one dies.
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        found = _joined(settings, work)
    except WorkerDied:
        sys.exit(_PEER_LOST)
    except TaggingError as error:
        said.put(("failed", error))
        sys.exit(1)
    if rank == 0:
        said.put(("done", found))


def _lost(settings: TrainerSettings, processes: Any, error: Exception) -> WorkerDied:
    """The error that tells which process died, not which ones noticed."""
    own = (0, None, _PEER_LOST, -signal.SIGTERM)
    dead = next(((i, p.exitcode) for i, p in enumerate(processes) if p.exitcode not in own), None)
    if dead is None:
        reason = one_line(error)[-300:]
        return WorkerDied(f"a process of this training ended: {reason}")
    rank, code = dead
    how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    return WorkerDied(
        f"process {rank + 1} of {len(processes)} of this training {how}, and the others with it; "
        f"go on with --resume {settings.save_dir}"
    )


def _end(processes: Any) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


# A process of several --------------------------------------------------------------------------


def _joined(settings: TrainerSettings, work: Callable[[Fabric], Result]) -> Result:
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    world = int(os.environ["WORLD_SIZE"])
    gpus = 0 if settings.n_gpu == 0 or not torch.cuda.is_available() else local
    if gpus > torch.cuda.device_count():
        raise ConfigError(f"{local} processes on this host, which has {torch.cuda.device_count()}")
    fabric = _fabric(settings, gpus=gpus, local=local, hosts=world // local)
    try:
        return work(fabric)
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError)
        if world > 1 and (lost or any(part in str(error) for part in _GONE)):
            if not _speaks():
                raise SystemExit(1) from error
            raise WorkerDied(
                "another process of this training has ended, and this one with it; "
                f"go on with --resume {settings.save_dir}"
            ) from error
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _speaks() -> bool:
    """False in torchrun's processes but the first; processes of our own tell who started them."""
    return os.environ.get("TORCHELASTIC_RUN_ID", _OWN_RUN) == _OWN_RUN or os.environ["RANK"] == "0"


def _gpus(settings: TrainerSettings) -> int:
    there = torch.cuda.device_count()
    count = min(1, there) if settings.n_gpu is None else settings.n_gpu
    if count > there:
        raise ConfigError(f"trainer.n_gpu: {count} GPUs wanted, this machine has {there}")
    if count and settings.processes > 1:
        raise ConfigError("trainer.processes: are those of a CPU; n_gpu names as many for GPUs")
    return count


def _fabric(settings: TrainerSettings, *, gpus: int, local: int, hosts: int) -> Fabric:
    """Fabric on the device and with the precision that the settings name, all processes joined."""
    precision = settings.precision
    if precision == "auto":
        # A fusion model is small: on a CPU, half precision would save nothing.
        precision = (
            resolve_precision("auto", "cuda", setting="trainer.precision") if gpus else "fp32"
        )
    # Its banner says nothing that the run's own lines do not.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator="cuda" if gpus else "cpu",
        devices=local,
        num_nodes=hosts,
        strategy="ddp" if local * hosts > 1 else "auto",
        precision=_FABRIC_PRECISION[precision],
    )
    fabric.launch()
    if settings.threads is None and local > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    set_threads(settings.threads)
    return fabric
