"""Many candidates at once: the tree of their prefixes, so that candidates share what their common first blocks compute.

Two candidates that choose the same operations up to a block have the same activations up to there, BN statistics
included. The results are those of one candidate after the other, to the bit. What a tree costs: space/splitting.py.
"""

import contextlib

import torch
from torch.nn.utils.fusion import fuse_conv_bn_weights

from blocks import conv_bn_pairs
from network import autocast, batch_norms, fold_bn


class _Node:
    """A part of the supernet at the end of a prefix, with the BN statistics that it has behind that prefix."""

    def __init__(self, supernet, key):
        self.key, self.norms = key, batch_norms(supernet.module_of(key))
        self.statistics = [(torch.zeros_like(n.running_mean), torch.ones_like(n.running_var)) for n in self.norms]
        self.children = {}
        self.candidate = None  # at a leaf

    def attach(self):
        """Makes the node's BN statistics those of the supernet's norms, which update them in training mode."""
        for norm, (mean, variance) in zip(self.norms, self.statistics):
            norm.running_mean, norm.running_var = mean, variance


class PrefixTree:
    """The candidates' prefixes as a tree: the stem is the root, every level a choice block, the head the leaves.

    A forward pass goes depth first, batch by batch. A node holds BN statistics alone (the convolutions are the
    supernet's), and an activation lives until its children are computed, so memory grows with the depth of the tree and
    hardly with the number of candidates. With `fold`, `logits` runs a copy whose BN is folded into the convolutions;
    `amp` "bf16" computes convolutions in bfloat16.
    """

    def __init__(self, supernet, candidates, fold=True, amp="off"):
        self.supernet, self.candidates, self.amp = supernet.eval(), candidates, amp
        self.folded = fold_bn(supernet) if fold else None
        self.twins = {}  # norm of the supernet -> its convolution, and that convolution's folded twin
        if fold:
            folded = dict(self.folded.named_modules())
            names = {module: name for name, module in supernet.named_modules()}
            self.twins = {norm: (conv, folded[names[conv]]) for conv, norm in conv_bn_pairs(supernet)}
        self.root = _Node(supernet, "stem")
        for candidate in candidates:
            node = self.root
            for key in (*enumerate(candidate), "head"):
                if key not in node.children:
                    node.children[key] = _Node(supernet, key)
                node = node.children[key]
            node.candidate = candidate

    @contextlib.contextmanager
    def own_statistics(self):
        """Within the block the supernet's norms have the nodes' statistics; afterwards they have their own again."""
        norms = batch_norms(self.supernet)
        before = [(n, n.momentum, n.running_mean, n.running_var, n.num_batches_tracked) for n in norms]
        for norm in norms:
            norm.running_mean, norm.running_var = torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var)
            norm.num_batches_tracked = None  # counting would cost a kernel a norm
        try:
            yield
        finally:
            for norm, *values in before:
                norm.momentum, norm.running_mean, norm.running_var, norm.num_batches_tracked = values
            self.supernet.eval()

    def forward(self, images):
        """Runs all candidates on images (N, 3, H, W); norms in training mode update the statistics of each node."""
        for _ in self._walk(self.supernet, images):
            pass

    def logits(self, images):
        """Yields (candidate, logits (N, classes)) for every candidate."""
        return self._walk(self.folded or self.supernet, images)

    def _walk(self, net, images):
        """As `logits`, through `net`: the supernet or its folded copy."""
        stack = [(self.root, images)]
        with autocast(images.device, self.amp):
            while stack:
                node, x = stack.pop()
                node.attach()
                if net is self.folded:
                    self._fold(node)
                x = net.part(node.key)(x)
                if node.candidate:
                    yield node.candidate, x
                stack += [(child, x) for child in node.children.values()]

    def _fold(self, node):
        """Folds the node's BN statistics into the convolutions of the folded copy."""
        for norm in node.norms:
            conv, folded = self.twins[norm]
            folded.weight, folded.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
