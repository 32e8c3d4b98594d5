"""The processes of a training: one, several on this host, or those that torchrun has started."""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from lightning_fabric import Fabric
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from common.errors import ConfigError, TaggingError, WorkerDied
from common.files import write_whole
from common.precision import Precision, resolve_precision, set_threads
from config.train import TrainerSettings

Result = TypeVar("Result")

_FABRIC_PRECISION: Mapping[Precision, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}
# How long processes of a failed training may take to end before they are killed: they have nothing
# to save, so less than torch's 30 s; much less would cut off a log that is being written.
_SHUTDOWN_S = 5
# How long a process waits for the launcher to end it: far more than the 0.1 s in which the launcher
# sees a dead process, for a machine that is overloaded. Too short, and the wrong one is named.
_LAUNCHER_S = 60
_OWN_RUN = "insighttag"
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_GONE = ("closed by peer", "reset by peer", "gloo", "NCCL", "Broken pipe", "TCPStore")


def run(settings: TrainerSettings, work: Callable[[Fabric], Result]) -> Result:
    """Do ``work`` in as many processes as the settings name; return what the first one returned.

    Each process calls it with its own Fabric; where there are several, it is pickled. What it
    raises in any of them is raised here; `WorkerDied` where one was killed.
    """
    if distributed.is_torchelastic_launched():  # torchrun has started this process
        return _joined(settings, work)
    gpus = _gpus(settings)
    processes = gpus or settings.processes
    if processes == 1:
        return work(_fabric(settings, gpus=gpus, local=1, hosts=1))
    return _launched(settings, work, processes)


def on_this_host() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def all_ranks(fabric: Fabric, work: Callable[[], Result]) -> Result:
    """Do ``work`` in every process; an error of one is raised in all."""
    if fabric.world_size == 1:
        return work()
    result: Result | None = None
    own_error: TaggingError | None = None
    try:
        result = work()
    except TaggingError as error:
        own_error = error
    for error_of_rank in gathered(fabric, own_error):
        if error_of_rank is not None:
            raise same_everywhere(error_of_rank)
    return cast("Result", result)


def same_everywhere(error: TaggingError) -> BaseException:
    """Return what to raise for a mistake that every process meets: one of them reports it."""
    return error if _reports() else SystemExit(2)


def gathered(fabric: Fabric, value: Result) -> list[Result]:
    """Return the values of all processes, in the order of their ranks."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    distributed.all_gather_object(values, value)
    return values


def _launched(settings: TrainerSettings, work: Callable[[Fabric], Result], count: int) -> Result:
    """Do ``work`` in processes of this host, by torch's own launcher."""
    # Its lines and tracebacks would hide ours: the error below says which process was the first.
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        max_restarts=0,
        run_id=_OWN_RUN,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        shutdown_timeout=_SHUTDOWN_S,
        # Its handlers would stay when it is done; the processes die with this one without them.
        signals_to_handle="",
    )
    with tempfile.TemporaryDirectory(prefix="insighttag-train-") as folder:
        errors = Path(folder)
        launch: Callable[..., dict[int, Result]] = elastic_launch(config, _process)
        try:
            return launch(settings, work, errors)[0]
        except ChildFailedError as error:
            raise _first_error(settings, errors, error, count) from error


def _process(settings: TrainerSettings, work: Callable[[Fabric], Result], errors: Path) -> Result:
    """Do ``work`` in a process that `_launched` has started."""
    # Dies with the process that started it, however that one dies.
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    try:
        return _joined(settings, work)
    except TaggingError as error:
        # An error does not survive the launcher as it is, but a file does.
        write_whole(errors / os.environ["RANK"], pickle.dumps(error))
        sys.exit(1)


def _first_error(
    settings: TrainerSettings, errors: Path, error: ChildFailedError, count: int
) -> TaggingError:
    """Return the error to raise when a process has failed: its own, or how it was ended."""
    files = sorted(errors.glob("[0-9]*"), key=lambda path: path.stat().st_mtime_ns)
    if files:
        return cast("TaggingError", pickle.loads(files[0].read_bytes()))  # noqa: S301  ours
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    if code > 0:
        reason = " ".join(failure.message.split())[-300:]
        return WorkerDied(f"a process of this training ended: {reason}")
    return WorkerDied(
        f"process {rank + 1} of {count} of this training was ended by signal {-code}, and the "
        f"others with it; continue with --resume {settings.save_dir}"
    )


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
            if os.environ["TORCHELASTIC_RUN_ID"] == _OWN_RUN:
                # The launcher names the process that ends first, which must be the one that died;
                # it then ends this one.
                time.sleep(_LAUNCHER_S)
            if not _reports():
                raise SystemExit(1) from error
            raise WorkerDied(
                "another process of this training has ended, and this one with it; "
                f"go on with --resume {settings.save_dir}"
            ) from error
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _reports() -> bool:
    """Return whether this process reports errors: the first of torchrun's, and all of our own."""
    return os.environ.get("TORCHELASTIC_RUN_ID", _OWN_RUN) == _OWN_RUN or os.environ["RANK"] == "0"


def _gpus(settings: TrainerSettings) -> int:
    available = torch.cuda.device_count()
    count = min(1, available) if settings.n_gpu is None else settings.n_gpu
    if count > available:
        raise ConfigError(
            f"trainer.n_gpu: {count} GPUs requested, but this machine has {available}"
        )
    if count and settings.processes > 1:
        raise ConfigError("trainer.processes: are for the CPU; for GPUs use n_gpu")
    return count


def _fabric(settings: TrainerSettings, *, gpus: int, local: int, hosts: int) -> Fabric:
    """Return Fabric with the settings' device and precision, all processes joined."""
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
