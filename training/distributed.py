"""Distributed training, one rank per GPU (or a CPU process), started by torchrun on one machine or on several.

    torchrun --nproc-per-node 8 supernet.py
    torchrun --nproc-per-node 8 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 supernet.py

Each step, all ranks take equal shares of the batch and the same path, and average their gradients, so the weights
stay equal on all ranks. Only the gradients of the path are reduced; those of the other operations are None on every
rank. A script started without torchrun is a single process, for which every function here is a no-op or the identity.
Source: paper section 3.3 (one path per step); the official code uses nn.DataParallel in one process.
"""

import contextlib
import ctypes
import datetime
import os
import shlex
import socket
import subprocess
import sys
import time
import zlib

import torch
import torch.distributed as dist

from utils import POLL_S, Silence, UserError, heartbeats_to, local_world_size, log, run_script

TIMEOUT = datetime.timedelta(minutes=10)  # for a collective, and for ranks without heartbeats in `together`
NOTICE_S = 30  # after which waiting for a rank is worth a line
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
LOST_RANK = "another rank of this run ended or hangs; the same command resumes from the last checkpoint"

_store = None  # the key-value store that the ranks share


def run(main, parse_args):
    """`utils.run_script` on every rank; prints an error that several ranks raise once.

    `main` must call `join`. Raises UserError where variables of torchrun are incomplete, or a rank does not come.
    """

    def begin():
        global _store
        _store = meet()
        return parse_args()

    def run_rank(parsed):
        main(parsed)
        if _store is not None:
            dist.destroy_process_group()

    def is_first(line):
        with contextlib.suppress(UserError):  # the store may have ended with its rank
            return _store is None or _add(f"printed {line}", 1) == 1
        return True

    run_script(run_rank, begin, is_first)


def meet():
    """The key-value store of the ranks that torchrun has started, once all of them have come; None for a process alone.

    A scheduler may set some of torchrun's variables, and a shell may have some left over.
    """
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *ADDRESS)}
    if not (found["RANK"] and found["WORLD_SIZE"]):
        return None
    for name in found.keys() - {"MASTER_ADDR"}:
        if found[name] and not found[name].isdecimal():
            raise UserError(f"{name} is {found[name]!r}, not a number; start by torchrun, or unset {name}")
    n = int(found["WORLD_SIZE"])
    if missing := ", ".join(name for name, value in found.items() if not value):
        text = f"RANK {found['RANK']} and WORLD_SIZE {n} are set, but not {missing}"
        if n > 1:
            how = "start by torchrun, which sets them all, or unset RANK WORLD_SIZE to train with one process"
            raise UserError(f"{text}: each of the {n} processes would train alone; {how}")
        log.warning("warning: %s: this process trains alone", text)
        return None
    try:
        return _store_of_all(int(found["RANK"]), n, found["MASTER_ADDR"], int(found["MASTER_PORT"]))
    except RuntimeError as error:  # raised by the store
        address = ":".join(found[name] for name in ADDRESS)
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"process {found['RANK']} of {n} can't meet the others at {address} ({reason})") from None


def _store_of_all(rank, n, host, port):
    """The store at an address, which rank 0 opens where torchrun has not, once `n` ranks have come."""
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    opens = rank == 0 and not by_torchrun
    store, came, said = None, 1, False
    start = time.monotonic()
    while True:
        # torch prints a page for each time that nobody answers
        if store is None and (opens or by_torchrun or _answers(host, port)):
            store = dist.TCPStore(host, port, n, opens, TIMEOUT, wait_for_workers=False, multi_tenant=True)
            # torchrun's store outlives the processes that it restarts, and has what those have left there
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            store.add("came", 1)
        if store is not None and (came := store.add("came", 0)) >= n:
            return store
        waited = time.monotonic() - start
        if waited > TIMEOUT.total_seconds():
            text = f"{came} of {n} processes came to {host}:{port} in {TIMEOUT.total_seconds() / 60:.0f} minutes"
            raise UserError(f"{text}; start the others, too")
        if waited > NOTICE_S and not said:
            said = True
            if store is None or store.add("said", 1) == 1:
                log.warning("waiting for other processes: %d of %d have come to %s:%d", came, n, host, port)
        time.sleep(min(POLL_S, 0.02 + waited / 10))


def _answers(host, port):
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def join(device="auto"):
    """Joins the ranks that `run` has found, on GPUs unless `device` is "cpu"; a single process has none to join."""
    if _store is None:
        return
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        number = int(os.environ["LOCAL_RANK"])
        if (n := max(local_world_size(), number + 1)) > torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node {n}: this machine has {torch.cuda.device_count()} GPUs; start one process for each"
            )
        torch.cuda.set_device(number)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo", store=_store, rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=TIMEOUT,
    )  # fmt: skip


def rank():
    """The rank of this process; rank 0 writes all files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gpu_count():
    """The number of GPUs that this process may use. CUDA stays uninitialised, so that CUDA_VISIBLE_DEVICES can be set.

    NVML counts them; for a driver without NVML, another process asks CUDA.
    """
    if torch.cuda._device_count_nvml() >= 0:
        return torch.cuda.device_count()
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0  # no driver
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(asked, capture_output=True, text=True).stdout or 0)


def unused_gpus(device):
    """A line that says how to use all GPUs of this machine, or None if none is idle."""
    if device.type != "cuda" or world_size() > 1 or (n := gpu_count()) < 2:
        return None
    return f"one of {n} GPUs is used; all of them: torchrun --nproc-per-node {n} {shlex.join(sys.argv)}"


def check_same(values):
    """Raises UserError on all ranks if the `values` (name -> value) of a rank differ from those of rank 0."""
    if world_size() == 1:
        return
    all_values = [None] * world_size()
    _collective(dist.all_gather_object, all_values, (socket.gethostname(), values))
    (_, first), *others = all_values
    for number, (host, other) in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                here, there = _difference(other[name], value)
                raise UserError(
                    f"process {number} (on {host}) has {name} {here}, process 0 {there}; "
                    "start all processes with the same settings, images and code"
                )


def _difference(a, b):
    """Two values as texts; of two lists, the first entries that differ."""
    if isinstance(a, list) and isinstance(b, list):
        a, b = next(((x, y) for x, y in zip(a, b) if x != y), (f"({len(a)} of them)", f"({len(b)} of them)"))
    return a, b


def per_rank_batch_size(batch_size, micro_batch=None):
    """Returns a rank's share of the batch.

    Raises UserError unless shares are equal and at least 2, as BN needs, and made of whole micro-batches.
    """
    n = world_size()
    if batch_size % n or batch_size < 2 * n:
        raise UserError(
            f"batches of {batch_size} images: not divisible into two or more for each of {n} ranks; "
            f"choose a --batch-size that is a multiple of {n}, at least {2 * n}"
        )
    if micro_batch and batch_size // n % micro_batch:
        raise UserError(
            f"--micro-batch {micro_batch} does not divide the {batch_size // n} images that a rank has of each batch; "
            "choose a divisor"
        )
    return batch_size // n


def together(function):
    """Returns `function()` once it has returned on every rank.

    For work that may take longer than a collective, such as the first reading of a data set: a rank waits as long as
    any rank has heartbeats. Raises UserError if a rank ended or hangs.
    """
    if world_size() == 1:
        return function()
    call = f"call {_add(f'calls of {rank()}', 1)}"
    with heartbeats_to(lambda: _add("heartbeats", 1), every_s=POLL_S):
        result = function()
    ready = _add(call, 1)
    silence, start = Silence(), time.monotonic()
    while ready < world_size():
        time.sleep(min(POLL_S, 0.02 + (time.monotonic() - start) / 10))
        ready = _add(call, 0)
        if silence.seconds("ranks", _add("heartbeats", 0)) > TIMEOUT.total_seconds():
            raise UserError(f"{LOST_RANK} (no heartbeat for {TIMEOUT.total_seconds():.0f} s)")
    return result


def _add(key, n):
    """Adds `n` to a number in the ranks' store, and returns it. Raises UserError if the store is gone."""
    try:
        return _store.add(key, n)
    except RuntimeError as error:
        raise UserError(f"{LOST_RANK} ({str(error).splitlines()[0][:100]})") from None


def local_rank0_first(function):
    """Returns `function()`, called on local rank 0 of each machine first, so that the others find its files."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    result = together(function if first else lambda: None)
    return together(lambda: result if first else function())


def on_rank0(function):
    """Calls `function()` on rank 0; returns its result, or raises its UserError, on every rank."""
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome = [function(), None]
        except UserError as error:
            outcome = [None, str(error)]
    if world_size() > 1:
        _collective(dist.broadcast_object_list, outcome, src=0, device=torch.device("cpu"))
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]


def broadcast_from_rank0(tensors):
    """Overwrites tensors with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            _collective(dist.broadcast, tensor, src=0)


def average_gradients(parameters, paths=()):
    """Replaces each gradient of a list of parameters by its mean over ranks, in one all_reduce.

    Raises UserError if ranks have gradients of different parameters, which would be added up wrongly, or of different
    `paths`: paths that differ in widths alone have gradients of the same parameters.
    """
    if world_size() == 1:
        return
    trained = zlib.crc32(repr(paths).encode(), zlib.crc32(bytes(p.grad is not None for p in parameters)))
    highest, lowest = _all_reduce(torch.tensor([trained, -trained]), dist.ReduceOp.MAX).tolist()
    if highest != -lowest:
        raise UserError("the ranks train different weights: sampler and rule must choose the same paths on all of them")
    _all_reduce_mean([p.grad for p in parameters if p.grad is not None])


def all_reduce_mean(tensors, weight):
    """Replaces tensors, means over `weight` samples on each rank, by the means over all samples."""
    if world_size() > 1:
        total = all_reduce_sum(torch.tensor(weight)).item()
        for tensor in tensors:
            tensor.mul_(weight * world_size() / total)
        _all_reduce_mean(tensors)


def _all_reduce_mean(tensors):
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    _collective(dist.all_reduce, flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view(tensor.shape))


def all_reduce_sum(values):
    """Returns the sum over ranks of a CPU tensor, which is not changed."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def mean(value):
    """Returns the mean over ranks of a tensor of one number, as a float."""
    return all_reduce_sum(value.detach().double().cpu()).item() / world_size()


def all_reduce_max(value):
    """Returns the maximum over ranks of an int."""
    return int(_all_reduce(torch.tensor(value), dist.ReduceOp.MAX))


def _all_reduce(values, operation):
    if world_size() > 1:
        values = values.clone()
        _collective(dist.all_reduce, values, operation)
    return values


def _collective(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except RuntimeError as error:  # from gloo as from NCCL
        raise UserError(f"{LOST_RANK} ({str(error).splitlines()[0][:100]})") from None
