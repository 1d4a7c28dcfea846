"""The training recipe of supernet and retrained network: one step, its learning rate, its parameter groups.

SGD with momentum, weight decay on weights with more than one dimension, a learning rate that falls linearly to 0, label
smoothing. Source: paper section 4; official `src/Supernet/train.py`, `utils.py`.
"""

import contextlib

import numpy as np
import torch
from torch import nn

import distributed
from network import autocast

DROPOUT = 0x44726F70  # separates these draws from others with the same seed


class Recipe:
    """Model, optimizer, gradient scaler and criterion of a training run with the settings `training` (a Training).

    A step's dropout is a pure function of `seed`, step, rank and micro-batch. The model is moved to `device`.
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
        parts = list(zip(images.split(size), labels.split(size)))
        first = distributed.rank() * len(parts)
        self.optimizer.zero_grad(set_to_none=True)
        results = [self._add_gradients(path, *parts[0], dropout_seed(self.seed, step, first), len(parts))]
        with unchanged(buffers_of(path) if len(parts) > 1 else ()):
            for number, part in enumerate(parts[1:], first + 1):
                results.append(self._add_gradients(path, *part, dropout_seed(self.seed, step, number), len(parts)))
        distributed.average_gradients(self.model.parameters())
        begin_momentum(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        losses, logits = zip(*results)
        return torch.stack(losses).sum(), torch.cat(logits)

    def _add_gradients(self, path, images, labels, seed, n_parts):
        """Adds the gradients of a micro-batch, one of `n_parts`; returns its share of the loss, and its logits."""
        torch.manual_seed(seed)
        with autocast(self.device, self.training.amp):
            for part in path:
                images = part(images)
            logits = self.model.classify(images)
        loss = self.criterion(logits, labels) / n_parts
        self.scaler.scale(loss).backward()
        return loss.detach(), logits.detach()

    def learning_rate(self, step):
        return learning_rate(step, self.training.iterations, self.training.lr, self.training.warmup)


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
