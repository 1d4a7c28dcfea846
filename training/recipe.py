"""The training recipe of supernet and retrained network: one step, its learning rate, its parameter groups.

SGD with momentum, weight decay on weights with more than one dimension, a learning rate that falls linearly to 0, label
smoothing. Source: paper section 4; official `src/Supernet/train.py`, `utils.py`.
"""

import numpy as np
import torch
from torch import nn

import distributed
from network import autocast

DROPOUT = 0x44726F70  # separates these draws from others with the same seed


class Recipe:
    """Model, optimizer, gradient scaler and criterion of a training run with the settings `training` (a Training).

    A step's dropout is a pure function of `seed`, step and rank. The model is moved to `device`.
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
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        torch.manual_seed(dropout_seed(self.seed, step, distributed.rank()))
        with autocast(self.device, self.training.amp):
            logits = self.model(images, candidate) if candidate else self.model(images)
        loss = self.criterion(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        distributed.average_gradients(self.model.parameters())
        begin_momentum(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, logits

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
