"""One training step of supernet and retrained network, and its rule: which paths it trains, by which losses.

SGD with momentum, weight decay on weights with more than one dimension, a learning rate that falls linearly to 0, label
smoothing. Source: paper section 4; official `src/Supernet/train.py`, `utils.py`.
"""

import random

import numpy as np
import torch
from torch import nn

from network import autocast
from space.own import REGISTRIES, find, register_rule
from training import distributed
from utils import UserError

DROPOUT, RULE = 0x44726F70, 0x52756C65  # separate these draws from others with the same seed


@register_rule("spos")
def single_path(step, candidate, images, labels):
    """The paper's rule: the loss of the step's path. A retrained network has no candidate (None)."""
    logits = step.forward(candidate, images)
    yield step.criterion(logits, labels), logits


def sgd(groups, training):
    """The official optimizer of a Training, for the groups of `parameter_groups`."""
    return torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, fused=True)


def linear(step, training):
    """The official learning rate of a step of a Training, with its warm-up."""
    return learning_rate(step, training.iterations, training.lr, training.warmup)


class Step:
    """Model, optimizer, gradient scaler and criterion of a training run with the settings `training` (a Training).

    A rule is a generator function `rule(step, candidate, images, labels)`, called once for each micro-batch, which
    yields (loss, logits (N, classes)) of each path that it trains. It has from this object, as its `step`:

        forward(candidate, images)   the logits, with mixed precision and compiled operations
        criterion(logits, labels)    the cross-entropy with label smoothing
        space, model, number         the search space, the model, and the number of the step, from 1
        rng                          a random.Random, the same on all ranks and in all micro-batches of a step

    Args:
        model: moved to `device`; its methods are those of network.Trainable
        seed: of dropout, a pure function of seed, step, rank and micro-batch, and of the rule's random numbers
        rule: a rule, or the name of a registered one (default: that of `training`)
        make_optimizer: parameter groups, Training -> optimizer
        learning_rate: step, Training -> learning rate
    """

    def __init__(
        self, model, training, device="cpu", seed=0, rule=None, make_optimizer=sgd, learning_rate=linear
    ):  # fmt: skip
        self.device = torch.device(device)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.parameters = list(self.model.parameters())
        self.space = model.space
        self.training = training
        self.seed = seed
        self.rule = find_rule(rule or training.rule)
        self.schedule = learning_rate
        self.make_optimizer = make_optimizer
        self.optimizer = make_optimizer(parameter_groups(model, training.weight_decay), training)
        if len({group["lr"] for group in self.optimizer.param_groups}) > 1:
            raise UserError("make_optimizer: gives groups different lr, but learning_rate sets one for all of them")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.amp == "fp16")
        self.criterion = nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)
        self.number = 0
        self.known = {}  # shared by all Buffers
        self.changed = [Buffers(self.known)]  # what forward passes change: in the step, and since its first micro-batch
        self.paths = []  # candidates that the step trains, in order
        self.updating = False  # whether the optimizer may have changed weights in an unfinished step

    def train_one_step(self, number, images, labels, candidate=None):
        """Trains what the rule makes of the candidate, or a stand-alone network, on this rank's share of a batch.

        Takes images (N, 3, H, W) and labels, (N,) or as probabilities (N, classes); steps count from 1. Returns the
        loss and the logits (N, classes) of the rule's last path. Weights of other paths get no gradient, so neither
        weight decay nor momentum changes them.

        With micro-batches, M of them on each rank, the step is that of M times as many ranks without: micro-batch i of
        rank r has the dropout of rank r * M + i, gradients are averaged, and BN keeps the statistics of the first.
        """
        self.number = number
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(number)
        size = self.training.micro_batch or len(images)
        batches = list(zip(images.split(size), labels.split(size)))
        self.optimizer.zero_grad(set_to_none=True)
        self.paths = []
        losses, others, outputs = [], [], []
        for i, batch in enumerate(batches):
            torch.manual_seed(dropout_seed(self.seed, number, distributed.rank() * len(batches) + i))
            if i == 1:
                self.changed.append(Buffers(self.known))
            found = []
            for loss, logits in self.by_rule(candidate, *batch):
                loss = loss / len(batches)
                self.scaler.scale(loss).backward()
                found.append(loss.detach())
                output = logits.detach()
            losses.append(found.pop())
            others += found
            outputs.append(output)
        if len(batches) > 1:
            self.changed.pop().restore()
        distributed.average_gradients(self.parameters, self.paths)
        self.updating = True
        begin_momentum(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updating = False
        self.changed = [Buffers(self.known)]  # here: what fails before the next step changes a buffer undoes nothing
        total = torch.stack(losses).sum()
        if others:  # a loss that is not finite shows, whichever path it is of
            total = total + 0 * torch.stack(others).sum()
        return total, torch.cat(outputs)

    def by_rule(self, candidate, images, labels):
        """Yields what the rule yields. Raises UserError if it is no generator, or yields nothing."""
        yielded = self.rule(self, candidate, images, labels)
        if not hasattr(yielded, "__next__"):
            raise UserError(f"--rule {name_of(self.rule)}: is no generator: write yield, not return")
        empty = True
        for pair in yielded:
            empty = False
            yield pair
        if empty:
            raise UserError(f"--rule {name_of(self.rule)}: yields no loss")

    def undo(self):
        """Takes back what a step that failed has changed; False if the optimizer had begun to change weights."""
        self.changed[0].restore()
        return not self.updating

    def forward(self, candidate, images):
        """Logits (N, classes) of images (N, 3, H, W) through a candidate, or through a stand-alone network (None)."""
        path = self.model.path(candidate)
        if torch.is_grad_enabled():
            self.paths.append(candidate)
        for buffers in self.changed:
            buffers.note(path)
        with autocast(self.device, self.training.amp):
            for part in path:
                images = self.run_part(part, images)
            return self.model.classify(images)

    def run_part(self, part, x):
        """Runs a part of a path; training/compiled.py runs it compiled."""
        return part(x)

    @property
    def rng(self):
        """Random numbers for the rule: the same at every call within a step."""
        return random.Random(int(np.random.SeedSequence([self.seed, RULE, self.number]).generate_state(1)[0]))

    def learning_rate(self, number):
        """The learning rate of a step."""
        return self.schedule(number, self.training)


class Buffers:
    """The buffers, above all BN statistics, of the paths that were noted, as they were before."""

    def __init__(self, known):
        self.known = known  # part -> its buffers, kept from step to step, because looking for them takes time
        self.parts = set()
        self.before = []  # (buffers of one type, their values in one tensor: a copy of each would be slow)

    def note(self, path):
        new = [part for part in path if part not in self.parts]
        self.parts.update(new)
        for part in new:
            module = getattr(part, "widest", part)
            if part not in self.known and isinstance(module, nn.Module):
                self.known[part] = list(module.buffers())
        buffers = [buffer for part in new for buffer in self.known.get(part, ())]
        for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
            same = [buffer for buffer in buffers if buffer.dtype == dtype]
            self.before.append((same, torch.cat([buffer.reshape(-1) for buffer in same])))

    def restore(self):
        for buffers, values in reversed(self.before):
            for buffer, before in zip(buffers, values.split([buffer.numel() for buffer in buffers])):
                buffer.copy_(before.view(buffer.shape))


# --- rules ---------------------------------------------------------------------------------------------------


def find_rule(rule):
    """A rule, given as such or by its name. Raises UserError if no rule has the name."""
    return rule if callable(rule) else find("rule", rule)


def name_of(rule):
    """The name under which a rule is registered, or that of its function."""
    names = [name for name, known in REGISTRIES["rule"].items() if known is rule]
    return names[0] if names else getattr(rule, "__qualname__", type(rule).__name__)


# --- arithmetic ----------------------------------------------------------------------------------------------


def learning_rate(step, iterations, base, warmup=0):
    """Learning rate of step 1 ... iterations: base * (1 - step / iterations), so the last step has 0.

    The official schedule also steps before the optimizer. During the first `warmup` steps (not official) the rate rises
    linearly to that line.
    """
    return base * (1 - step / iterations) * min(1.0, step / warmup if warmup else 1.0)


def parameter_groups(model, weight_decay):
    """Parameter groups: weights with more than one dimension decay, the others (BN) don't (official)."""
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
    """Sets momentum buffers of SGD to 0 for parameters that have their first gradient: fused SGD needs a buffer for all
    of a group or for none. The first step equals torch's own, which initialises the buffer with the gradient."""
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and group["momentum"] and not optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
