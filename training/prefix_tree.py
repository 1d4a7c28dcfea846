"""Runs many candidates at once, as the tree of their prefixes, so that common first blocks are computed once.

Two candidates that choose the same operations up to a block have the same activations up to there, BN statistics
included. The results equal those of one candidate at a time, to the bit. For the cost see space/splitting.py.
"""

import contextlib

from torch.nn.utils.fusion import fuse_conv_bn_weights

from blocks import Narrow, conv_bn_pairs, first_channels
from network import autocast, batch_norms, fold_bn
from utils import heartbeat


class _Part:
    """A part of the supernet that nodes run: as `run`, or as `folded`, with BN folded; `norms` are its BN layers."""

    def __init__(self, supernet, fold, key):
        self.run = supernet.part(key)
        module = supernet.module_of(key)  # has the weights
        # An own operation may change its input in place, which is that of other nodes, too.
        self.copies = isinstance(key, tuple) and type(module).__module__ != "blocks"
        narrow = isinstance(self.run, Narrow)
        form = self.run.form if narrow else module  # has the shapes at this width
        self.norms = batch_norms(module)
        self.channels = [norm.num_features for norm in batch_norms(form)]
        self.folded, self.pairs, self.others = self.run, (), ()
        if fold and not (narrow and _has_other_weights(form)):
            copy = fold_bn(form)
            self.folded = (lambda x: supernet.classify(copy(x))) if key == "head" else copy
            self._find_pairs(form, module, copy)

    def _find_pairs(self, form, widest, copy):
        """Pairs what `fold` reads in `widest` with what it changes in `copy`, a copy of `form`."""
        names = {module: name for name, module in form.named_modules()}
        originals = dict(widest.named_modules())
        copies = dict(copy.named_modules())
        # (convolution, index of its weights at this width, norm, folded convolution)
        self.pairs = [
            (originals[names[conv]], first_channels(conv.weight.shape), originals[names[norm]], copies[names[conv]])
            for conv, norm in conv_bn_pairs(form)
        ]
        folded = {norm for _, _, norm, _ in self.pairs}
        # (norm, its copy) of norms that follow no convolution
        self.others = [
            (originals[names[norm]], copies[names[norm]])
            for norm in batch_norms(form)
            if originals[names[norm]] not in folded
        ]

    def fold(self):
        """Brings `folded` up to date with the statistics of the norms."""
        for conv, index, norm, folded in self.pairs:
            bias = None if conv.bias is None else conv.bias[index[:1]]
            folded.weight, folded.bias = fuse_conv_bn_weights(
                conv.weight[index], bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
        for norm, copy in self.others:
            copy.running_mean, copy.running_var = norm.running_mean, norm.running_var


def _has_other_weights(form):
    """Whether a module has weights outside of convolutions and the norms behind them; then nothing is folded."""
    folds = {module for pair in conv_bn_pairs(form) for module in pair}
    return any(module not in folds and list(module.parameters(recurse=False)) for module in form.modules())


class _Node:
    """A part of the supernet at the end of a prefix, with its BN statistics for that prefix."""

    def __init__(self, part):
        self.part = part
        self.children = {}
        self.statistics = [
            (n.running_mean.new_zeros(c), n.running_var.new_ones(c)) for n, c in zip(part.norms, part.channels)
        ]
        self.candidate = None  # at a leaf

    def attach(self):
        """Makes the supernet's norms use the node's BN statistics; in training mode they update them in place.

        At a narrow width the statistics are shorter than the norm's, since a Narrow uses only the first channels.
        """
        for norm, (mean, variance) in zip(self.part.norms, self.statistics):
            norm.running_mean, norm.running_var = mean, variance


class PrefixTree:
    """The tree of the candidates' prefixes: the stem is the root, each level is a choice block, the head is the leaves.

    A forward pass goes depth first, batch by batch. A node holds only BN statistics (the convolutions are the
    supernet's), and an activation lives until its children are computed, so memory grows with the depth of the tree and
    hardly with the number of candidates. With `fold`, `logits` runs a copy whose BN is folded into the convolutions;
    `amp` "bf16" computes convolutions in bfloat16.
    """

    def __init__(self, supernet, candidates, fold=True, amp="off"):
        self.supernet = supernet.eval()
        self.candidates = candidates
        self.fold = fold
        self.amp = amp
        self.root = _Node(_Part(supernet, fold, "stem"))
        parts = {}
        for candidate in candidates:
            node = self.root
            for key in (*enumerate(supernet.space.block_choices(candidate)), "head"):
                if key not in node.children:
                    if key not in parts:
                        parts[key] = _Part(supernet, fold, key)
                    node.children[key] = _Node(parts[key])
                node = node.children[key]
            node.candidate = candidate

    @contextlib.contextmanager
    def own_statistics(self):
        """Within the block the supernet's norms use the nodes' statistics; afterwards their own are restored."""
        norms = batch_norms(self.supernet)
        before = [(n, n.momentum, n.running_mean, n.running_var, n.num_batches_tracked) for n in norms]
        for norm in norms:  # `_Node.attach` replaces their statistics, part by part
            norm.num_batches_tracked = None  # counting would cost a kernel per norm
        try:
            yield
        finally:
            for norm, *values in before:
                norm.momentum, norm.running_mean, norm.running_var, norm.num_batches_tracked = values
            self.supernet.eval()

    def forward(self, images):
        """Runs all candidates on images (N, 3, H, W); norms in training mode update the statistics of each node."""
        for _ in self._walk(images, fold=False):
            pass

    def logits(self, images):
        """Yields (candidate, logits (N, classes)) for every candidate."""
        return self._walk(images, self.fold)

    def _walk(self, images, fold):
        stack = [(self.root, images)]
        with autocast(images.device, self.amp):
            while stack:
                heartbeat()
                node, x = stack.pop()
                node.attach()
                if fold:
                    node.part.fold()
                x = (node.part.folded if fold else node.part.run)(x.clone() if node.part.copies else x)
                if node.candidate:
                    yield node.candidate, x
                stack += [(child, x) for child in node.children.values()]
