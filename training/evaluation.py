"""How good candidates are: BN statistics recalibrated for each, then exact accuracy.

A list of candidates is evaluated as the tree of its prefixes: candidates that choose the same first blocks share what these
compute. The numbers are those of one candidate after the other, to the bit.

Source: paper section 3.4 (BN statistics are recalculated before inference); official `src/Search/tester.py`.
"""

import contextlib
import copy
import time

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

import distributed
from images.image_cache import calibration_batches, validation_batches
from training import checkpoint
from utils import UserError


class Evaluator:
    """The supernet of the arguments with its calibration and validation images (`args.split`); `evaluate(candidates)` gives results."""

    def __init__(self, args):
        self.supernet, stored, config, data = checkpoint.open_supernet(args)
        self.device = resolve_device(args)
        self.space, self.bn, self.amp = stored.space, args.bn, args.eval_amp
        self.supernet.to(self.device, memory_format=torch.channels_last)
        self.calibration = calibration_batches(data.images("supernet"), config, args, self.device)
        self.validation = validation_batches(data.images(args.split), config, args, self.device)

    def evaluate(self, candidates):
        candidates = [self.space.check(c) for c in candidates]
        return evaluate(self.supernet, candidates, self.calibration, self.validation, self.bn, amp=self.amp)


def resolve_device(args):
    """The torch device of --device; --threads takes effect too. Raises UserError where there is no GPU to use."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that torch can use; leave the flag out or say cpu")
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(device, amp):
    """The context of --amp and --eval-amp: "off", or "bf16" or "fp16" for convolutions in such numbers."""
    return torch.autocast(device.type, dtype=torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def momentum(mode, n):
    """BN momentum of the n-th calibration batch: 0.1, an exponential average that sees about the last 19 batches (mode "ema",
    official), or 1 / n, the plain average of all (mode "average")."""
    return 0.1 if mode == "ema" else 1 / n


def recalibrate_bn(model, forward, batches, mode="ema"):
    """Resets all BN statistics of `model` and recalculates those that `forward(images)` passes through.

    `batches` yields (images, labels); for `mode` see `momentum`, whose "average" is that over the batches of all processes.
    Dropout stays off; the model is left in eval mode.
    """
    model.eval()
    norms, n = batch_norms(model), 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    with torch.inference_mode():
        for n, (images, _) in enumerate(batches, 1):
            for norm in norms:
                norm.momentum = momentum(mode, n)
            forward(images)
        if mode == "average":
            distributed.all_reduce_mean([t for norm in norms for t in (norm.running_mean, norm.running_var)], n)
    for norm, value in zip(norms, momenta):
        norm.momentum = value
    model.eval()


def correct_counts(logits, labels):
    """(top-1, top-5) numbers of correct images, as a tensor (2,) on the device: no synchronisation."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = top == labels[:, None]
    return torch.stack((hits[:, 0].sum(), hits.sum()))


def accuracy(forward, batches):
    """(top-1 percent, top-5 percent, number of images), exact over ragged batches and the batches of several processes.

    Run it on a model in eval mode.
    """
    counts, n_images = 0, 0
    with torch.inference_mode():
        for images, labels in batches:
            counts = counts + correct_counts(forward(images), labels)
            n_images += len(labels)
    counts, n_images = _totals([counts], n_images)
    top1, top5 = (counts[0] * 100 / n_images).tolist()
    return top1, top5, n_images


def _totals(counts, n_images):
    """The numbers of correct images as a tensor (candidates, 2), and that of images, over all processes."""
    here = torch.zeros(len(counts), 2, dtype=torch.double)
    if n_images:
        here += torch.stack(counts).cpu()
    return distributed.all_reduce_sum(here), distributed.all_reduce_sum(torch.tensor(n_images)).item()


def evaluate(supernet, candidates, calibration, validation, bn="ema", fold=True, amp="off"):
    """A result for each candidate, in order: architecture, FLOPs, acc1 and acc5 in percent, n_images, seconds (its share).

    `calibration` and `validation` yield the same (images, labels) batches at every iteration. With `fold`, BN is folded into
    the convolutions for validation; `amp` "bf16" computes convolutions in bfloat16. The supernet is left in eval mode, its BN
    statistics as they were.
    """
    start, candidates = time.perf_counter(), [tuple(c) for c in candidates]
    tree = PrefixTree(supernet, candidates, fold, amp)
    with torch.inference_mode(), tree.borrowed_norms():
        tree.calibrate(calibration, bn)
        accuracies = tree.validate(validation)
    seconds = round((time.perf_counter() - start) / len(candidates), 3)
    return [
        {"architecture": list(c), "flops": supernet.space.flops(c), **accuracies[c], "seconds": seconds}
        for c in candidates
    ]


def fold_bn(model):
    """A copy of the model in eval mode whose BN layers are folded into the convolutions before them."""
    model = copy.deepcopy(model).eval()
    for layers in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm2d):
                layers[i - 1], layers[i] = fuse_conv_bn_eval(layers[i - 1], layer), nn.Identity()
    return model


class _Node:
    """A part of the supernet (stem, an operation of a block, head) at the end of a prefix, with the BN statistics that it has
    behind that prefix."""

    def __init__(self, key, norms):
        self.key, self.norms = key, norms
        self.statistics = [(torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var)) for norm in norms]
        self.children = {}
        self.candidate = None  # where a path ends

    def attach(self):
        for norm, (mean, variance) in zip(self.norms, self.statistics):
            norm.running_mean, norm.running_var = mean, variance


class PrefixTree:
    """The candidates' prefixes as a tree, evaluated batch by batch and depth first.

    The convolutions are the supernet's own, a node holds BN statistics alone, and activations live as long as the nodes that
    follow need them: memory grows with the depth of the tree, hardly with the number of candidates.
    """

    def __init__(self, supernet, candidates, fold=True, amp="off"):
        self.supernet, self.candidates, self.amp = supernet.eval(), candidates, amp
        self.folded = fold_bn(supernet) if fold else None
        self.convolutions = {}  # of a norm: the one before it, and that one's folded twin
        if fold:
            modules, twins = dict(supernet.named_modules()), dict(self.folded.named_modules())
            for name, norm in modules.items():
                if isinstance(norm, nn.BatchNorm2d):
                    parent, _, index = name.rpartition(".")
                    conv = f"{parent}.{int(index) - 1}"
                    self.convolutions[norm] = modules[conv], twins[conv]
        self.root = _Node("stem", batch_norms(supernet.first_conv))
        for candidate in candidates:
            node = self.root
            for key in (*enumerate(candidate), "head"):
                if key not in node.children:
                    layers = supernet.conv_last if key == "head" else supernet.features[key[0]][key[1]]
                    node.children[key] = _Node(key, batch_norms(layers))
                node = node.children[key]
            node.candidate = candidate

    @contextlib.contextmanager
    def borrowed_norms(self):
        """Puts the supernet's norms back as they were."""
        norms = batch_norms(self.supernet)
        before = [(n, n.momentum, n.running_mean, n.running_var, n.num_batches_tracked) for n in norms]
        for norm in norms:
            norm.num_batches_tracked = None  # counting would cost a kernel a norm
        try:
            yield
        finally:
            for norm, *values in before:
                norm.momentum, norm.running_mean, norm.running_var, norm.num_batches_tracked = values
            self.supernet.eval()

    def calibrate(self, batches, mode="ema"):
        """Calculates the BN statistics of every node from the batches of (images, labels); for `mode` see `momentum`."""
        norms = batch_norms(self.supernet)
        for n, (images, _) in enumerate(batches, 1):
            for norm in norms:
                norm.momentum = momentum(mode, n)
                norm.train()
            for _ in self._run(self.supernet, images):
                pass
        self.supernet.eval()

    def logits(self, images):
        """Yields (candidate, logits (N, classes)) for every candidate, with the statistics that `calibrate` calculated."""
        return self._run(self.folded or self.supernet, images)

    def validate(self, batches):
        """{candidate: {"acc1": percent, "acc5": percent, "n_images": n}}, exact over ragged batches and several processes."""
        correct, n_images = dict.fromkeys(self.candidates, 0), 0
        for images, labels in batches:
            for candidate, logits in self.logits(images):
                correct[candidate] = correct[candidate] + correct_counts(logits, labels)
            n_images += len(labels)
        counts, n_images = _totals(list(correct.values()), n_images)
        return {
            candidate: {"acc1": acc1, "acc5": acc5, "n_images": n_images}
            for candidate, (acc1, acc5) in zip(correct, (counts * 100 / n_images).tolist())
        }

    def _run(self, net, images):
        """As `logits`, through `net`: the supernet or its folded twin."""
        stack = [(self.root, images)]
        with autocast(images.device, self.amp):
            while stack:
                node, x = stack.pop()
                node.attach()
                if net is self.folded:
                    self._fold(node)
                x = self._part(net, node.key)(x)
                if node.candidate:
                    yield node.candidate, x
                stack += [(child, x) for child in node.children.values()]

    @staticmethod
    def _part(net, key):
        if isinstance(key, tuple):
            block, choice = key
            return net.features[block][choice]
        return {"stem": net.first_conv, "head": net.head}[key]

    def _fold(self, node):
        for norm in node.norms:
            conv, folded = self.convolutions[norm]
            folded.weight, folded.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
