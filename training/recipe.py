"""The training recipe of supernet and retrained network: one step, its learning rate, its parameter groups.

SGD with momentum, weight decay on weights with more than one dimension, a learning rate that falls linearly to 0, label
smoothing. Source: paper section 4; official `src/Supernet/train.py`, `utils.py`.
"""

import contextlib
import getpass
import os
import pathlib
import time
import types

import numpy as np
import torch
from torch import nn

from blocks import Narrow
from network import autocast
from training import distributed
from utils import UserError, duration, heartbeat, log, private_folder

DROPOUT = 0x44726F70  # separates these draws from others with the same seed
BACKEND = "inductor"  # of torch.compile
NO_WIDTHS = "--compile: operations of several widths can't be compiled; leave the flag out"


class Recipe:
    """Model, optimizer, gradient scaler and criterion of a training run with the settings `training` (a Training).

    A step's dropout is a pure function of `seed`, step, rank and micro-batch. The model is moved to `device`. If it is
    to be compiled, the first step does so; a UserError is raised if that is not possible.
    """

    def __init__(self, model, training, device="cpu", seed=0):
        self.device = torch.device(device)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.training = training
        self.seed = seed
        groups = parameter_groups(model, training.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.amp == "fp16")
        self.criterion = nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)
        self.run = run_part  # or, once they are compiled, CompiledParts

    def train_one_step(self, step, images, labels, candidate=None):
        """Trains the candidate's weights, or a stand-alone network, on this rank's share of a batch.

        Takes images (N, 3, H, W) and labels (N,); steps count from 1. Returns the loss and the logits (N, classes).
        Operations that are not in the candidate get no gradient, so neither weight decay nor momentum changes them.

        With micro-batches, M of them on each rank, the step is that of M times as many ranks without: micro-batch i of
        rank r has the dropout of rank r * M + i, gradients are averaged, and BN keeps the statistics of the first.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        path = self.model.path(candidate) if candidate else self.model.path()
        size = self.training.micro_batch or len(images)
        first, *others = batches = list(zip(images.split(size), labels.split(size)))
        n = len(batches)
        seeds = [dropout_seed(self.seed, step, distributed.rank() * n + i) for i in range(n)]
        if self.training.compile and self.run is run_part:
            distributed.local_rank0_first(lambda: self._compile(*first))
        self.optimizer.zero_grad(set_to_none=True)
        with torch_compiler("fail_on_recompile") if self.training.compile else contextlib.nullcontext():
            results = [self._add_gradients(path, *first, seeds[0], n)]
            with unchanged(buffers_of(path) if others else ()):
                results += [self._add_gradients(path, *batch, seed, n) for batch, seed in zip(others, seeds[1:])]
        distributed.average_gradients(self.model.parameters())
        begin_momentum(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        losses, logits = zip(*results)
        return torch.stack(losses).sum(), torch.cat(logits)

    def _add_gradients(self, path, images, labels, seed, n):
        """Adds the gradients of one of `n` micro-batches; returns its share of the mean loss, and its logits."""
        torch.manual_seed(seed)
        with autocast(self.device, self.training.amp):
            for part in path:
                images = self.run(part, images)
            logits = self.model.classify(images)
        loss = self.criterion(logits, labels) / n
        self.scaler.scale(loss).backward()
        return loss.detach(), logits.detach()

    def _compile(self, images, labels):
        """Compiles every part of the model, by steps that change nothing."""
        start = time.perf_counter()
        self.run = CompiledParts()
        with unchanged(list(self.model.buffers())), torch_compiler("default"):
            for path in self.model.paths_through_all():
                self._add_gradients(path, images, labels, 0, 1)
        n = len(self.run.of_part)
        graphs = len(self.run.functions)
        took = duration(time.perf_counter() - start)
        log.info("compiled stem, operations and last convolution, %d modules as %d graphs, in %s", n, graphs, took)

    def learning_rate(self, step):
        return learning_rate(step, self.training.iterations, self.training.lr, self.training.warmup)


# --- compiled parts ------------------------------------------------------------------------------------------


def run_part(part, x):
    return part(x)


class CompiledParts:
    """Runs a part of a path, a module, compiled by torch.compile; equal modules share a graph.

    Dynamo compares a call with the graphs of a function's code one after the other, and compiles no more than 8 of
    them, so every graph has a copy of `run_part` of its own.
    """

    def __init__(self):
        self.functions = {}  # (structure of a module, shape of its input) -> compiled function
        self.of_part = {}

    def __call__(self, part, x):
        if part not in self.of_part:
            heartbeat()
            if isinstance(part, Narrow):
                raise UserError(NO_WIDTHS)
            self.of_part[part] = self._function(str(part), x.shape)
        return self.of_part[part](part, x)

    def _function(self, *key):
        if key not in self.functions:
            code = run_part.__code__.replace(co_name=f"part_{len(self.functions)}")
            function = types.FunctionType(code, globals())
            self.functions[key] = torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)
        return self.functions[key]


@contextlib.contextmanager
def torch_compiler(stance):
    """Within the block torch.compile has a stance ("fail_on_recompile"); what it can't compile is a UserError."""
    try:
        with torch.compiler.set_stance(stance):
            yield
    except RuntimeError as error:
        if "fail_on_recompile" in str(error):
            text = "an operation's input has another form than those before, and would be compiled again"
        elif isinstance(error, torch._dynamo.exc.TorchDynamoException):
            cause = str(error).partition("Set TORCHDYNAMO")[0].split()
            text = f"torch can't compile an operation ({' '.join(cause)[:300]})"
        else:
            raise
        raise UserError(f"--compile: {text}; leave the flag out") from None


def prepare_compiler(device, cache, n_widths=1):
    """Has torch.compile keep its results in a folder below `cache`; they are code, so it is this user's alone.

    Raises UserError if torch lacks what it needs to compile for the device, if there are widths to choose from, or if
    others can write to the folder.
    """
    if n_widths > 1:
        raise UserError(NO_WIDTHS)
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError("--compile: torch finds no Triton that compiles for this GPU; leave the flag out")
    else:
        from torch._inductor import cpp_builder

        try:
            cpp_builder.get_cpp_compiler()
        except RuntimeError:
            raise UserError(
                "--compile: no C++ compiler, neither g++ nor that of CXX; install one, or leave the flag out"
            ) from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_folder(pathlib.Path(cache) / f"compiled-{getpass.getuser()}"))


# --- arithmetic ----------------------------------------------------------------------------------------------


def learning_rate(step, iterations, base, warmup=0):
    """Learning rate of step 1 ... iterations: base * (1 - step / iterations), so the last step has 0.

    The official schedule also steps before the optimizer. During the first `warmup` steps (not official) the rate rises
    linearly to that line.
    """
    return base * (1 - step / iterations) * min(1.0, step / warmup if warmup else 1.0)


def parameter_groups(model, weight_decay):
    """SGD parameter groups: weights with more than one dimension decay, the others (BN) don't (official)."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return groups


def buffers_of(path):
    """The buffers, above all BN statistics, of what images pass through (`path` of the networks)."""
    return [buffer for part in path for buffer in getattr(part, "widest", part).buffers()]


@contextlib.contextmanager
def unchanged(tensors):
    """Within the block the tensors may change; afterwards they have the values of before."""
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, value in zip(tensors, before):
        tensor.copy_(value)


def dropout_seed(seed, step, rank=0):
    """Seed of the dropout of a step on a rank, in 32 bits: torch accepts no more on the CPU."""
    return int(np.random.SeedSequence([seed, DROPOUT, step, rank]).generate_state(1)[0])


def begin_momentum(optimizer):
    """Sets momentum buffers to 0 for parameters that have their first gradient: fused SGD needs a buffer for all of a
    group or for none. The first step equals torch's own, which initialises the buffer with the gradient."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and group["momentum"] and not optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
