"""How good a candidate is: BN statistics recalibrated for it, then exact accuracy.

Source: paper section 3.4 (BN statistics are recalculated before inference); official `src/Search/tester.py`.
"""
import time

import torch
from torch import nn

from utils import UserError


def resolve_device(args):
    """The torch device of --device; --threads takes effect too. Raises UserError where there is no GPU to use."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that torch can use; leave the flag out or say cpu")
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def recalibrate_bn(model, forward, batches, mode="ema"):
    """Resets all BN statistics of `model` and recalculates those that `forward(images)` passes through.

    `batches` yields (images, labels). mode "ema": exponential average with momentum 0.1 (official, sees about the last
    19 batches); "average": plain average over all batches. Dropout stays off; the model is left in eval mode.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = 0.1 if mode == "ema" else None
    with torch.inference_mode():
        for images, _ in batches:
            forward(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.eval()


def correct_counts(logits, labels):
    """(top-1, top-5) numbers of correct images, as a tensor (2,) on the device: no synchronisation."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = top == labels[:, None]
    return torch.stack((hits[:, 0].sum(), hits.sum()))


def accuracy(forward, batches):
    """(top-1 percent, top-5 percent, number of images), exact over ragged batches. Run it on a model in eval mode."""
    correct, n_images = 0, 0
    with torch.inference_mode():
        for images, labels in batches:
            correct = correct + correct_counts(forward(images), labels)
            n_images += len(labels)
    top1, top5 = (correct.double() * 100 / n_images).tolist()
    return top1, top5, n_images


def evaluate(supernet, candidates, calibration, validation, bn="ema"):
    """Yields a result for each candidate: architecture, FLOPs, acc1 and acc5 in percent, n_images, seconds.

    `calibration` and `validation` yield the same (images, labels) batches at every iteration. The supernet's BN
    statistics are overwritten.
    """
    for candidate in candidates:
        start = time.perf_counter()

        def forward(images, candidate=candidate):
            return supernet(images, candidate)

        recalibrate_bn(supernet, forward, calibration, bn)
        acc1, acc5, n_images = accuracy(forward, validation)
        yield {
            "architecture": list(candidate), "flops": supernet.space.flops(candidate), "acc1": acc1, "acc5": acc5,
            "n_images": n_images, "seconds": round(time.perf_counter() - start, 3),
        }  # fmt: skip
