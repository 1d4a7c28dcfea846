"""Training on several processes, one a GPU, which torchrun starts on one machine or on many.

    torchrun --nproc-per-node 8 supernet.py
    torchrun --nproc-per-node 8 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 supernet.py

Every process takes an equal share of each batch, and all of them the step's one path. The mean of their gradients is that of
the whole batch, so weights stay the same everywhere. Only the gradients of the path are sent: those of the other operations
are None on every process. Started without torchrun a script is one process, and nothing here does anything.
Source: paper section 3.3 (one path a step); the official code is nn.DataParallel, one process.
"""

import datetime
import os

import torch
import torch.distributed as dist

from utils import UserError, run_script

TIMEOUT = datetime.timedelta(
    hours=12
)  # of a wait for the others: the first one checks all images meanwhile; who ends is noticed at once
LOST = "another process of this run ended; the same command goes on from the last checkpoint"


def run(main, parse_args):
    """`utils.run_script` on every process that torchrun started; what is wrong for several of them is said once."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return run_script(main, parse_args)
    store, rank, n = next(dist.rendezvous("env://"))

    def joined(args):
        on_gpus = args.device != "cpu" and torch.cuda.is_available()
        if on_gpus:
            if local_world_size() > torch.cuda.device_count():
                raise UserError(
                    f"--nproc-per-node {local_world_size()}: this machine has {torch.cuda.device_count()} GPUs; start one process for each"
                )
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=n, timeout=TIMEOUT
        )
        main(args)
        dist.destroy_process_group()

    run_script(joined, parse_args, lambda line: store.add(f"said {line}", 1) == 1)


def rank():
    """The number of this process, from 0; process 0 writes all that is written."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size():
    """The number of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def per_rank_batch_size(batch_size):
    """The images of a batch that each process takes. Raises UserError where they can't be equally many, and at least two for BN."""
    if batch_size % world_size() or batch_size < 2 * world_size():
        raise UserError(
            f"--batch-size {batch_size}: not two or more for each of {world_size()} processes, equally many; choose a multiple of {world_size()}"
        )
    return batch_size // world_size()


def local_rank0_first(function):
    """The result of `function()`; the first process of each machine goes first, and leaves what the others find done."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    result = function() if first else None
    if world_size() > 1:
        _collective(dist.barrier)
    return result if first else function()


def on_rank0(function):
    """What `function()` returns on process 0, or the UserError that it raises there, on every process."""
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
    """Overwrites tensors with those of process 0."""
    if world_size() > 1:
        for tensor in tensors:
            _collective(dist.broadcast, tensor, src=0)


def average_gradients(parameters):
    """Replaces each gradient by its mean over the processes, in one exchange; a parameter has one on all of them or on none."""
    if world_size() > 1:
        _all_reduce_mean([p.grad for p in parameters if p.grad is not None])


def all_reduce_mean(tensors, weight):
    """Replaces tensors, the means over `weight` things on each process, by the means over all things."""
    if world_size() > 1:
        everything = all_reduce_sum(torch.tensor(weight)).item()
        for tensor in tensors:
            tensor.mul_(weight * world_size() / everything)
        _all_reduce_mean(tensors)


def _all_reduce_mean(tensors):
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    _collective(dist.all_reduce, flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view(tensor.shape))


def all_reduce_sum(values):
    """The sum over all processes of a tensor on the CPU, a new one where there are several."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_max(value):
    """The highest of all processes' whole numbers."""
    return int(_all_reduce(torch.tensor(value), dist.ReduceOp.MAX))


def _all_reduce(values, operation):
    if world_size() > 1:
        values = values.clone()
        _collective(dist.all_reduce, values, operation)
    return values


def _collective(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except RuntimeError as error:  # of gloo and NCCL alike
        raise UserError(f"{LOST} ({str(error).splitlines()[0][:100]})") from None
