"""Evaluation of candidates: recalibrates the BN statistics of each, then measures its accuracy exactly.

Source: paper section 3.4 (BN statistics are recalculated before inference); official `src/Search/tester.py`.
"""

import dataclasses
import itertools
import math
import time

import torch

from dataloader import Loader
from images.dataset import calibration_plan, evaluation_plan
from images.image_cache import FixedBatches
from network import batch_norms
from settings.subjects import DataConfig, Evaluation, Images, Run, Testing
from space.splitting import cut
from training import checkpoint, distributed
from training.prefix_tree import PrefixTree
from utils import UserError

NO_GPU = "--device cuda: no GPU that torch can use; leave it out or say cpu"


def calibration_batches(loader, batches=200, batch_size=128, seed=0, cache=None):
    """The training images that recalibrate BN: stratified by class, augmented, the same for all candidates.

    `loader` is a Loader of the training images that augments.
    """
    return FixedBatches(loader, calibration_plan(loader.images.labels, batches, batch_size, seed), cache)


def calibration_warning(evaluation, n_images):
    """A line that says that the batches of an Evaluation are more than the images that the supernet trains on, or None.

    Then some count more than others.
    """
    n = evaluation.bn_batches * evaluation.bn_batch_size
    if n <= n_images:
        return None
    batches = f"--bn-batches {evaluation.bn_batches} of {evaluation.bn_batch_size} are {n:,} images"
    enough = max(1, n_images // evaluation.bn_batch_size)
    return f"{batches}, more than the {n_images:,} that the supernet trains on: {enough} batches will do"


def validation_batches(loader, batch_size=200, cache=None):
    """All images of a Loader once, shared among the ranks."""
    plan = evaluation_plan(len(loader.images), batch_size)
    return FixedBatches(loader, plan, cache, distributed.rank(), distributed.world_size())


def open_evaluation(values, listed=None):
    """(supernet on the device, calibration batches, validation batches) by the settings of a trial (name -> value).

    `listed` is a file of Data.write_list. Raises UserError if checkpoint, settings and images don't match.
    """
    image_settings = Images.of(values)
    evaluation = Evaluation.of(values)
    device = resolve_device(values["device"], values["threads"])
    supernet, _, config, data = checkpoint.open_supernet(values, listed)
    data.warn()
    supernet.to(device, memory_format=torch.channels_last)

    def loader(part, augment):
        how = image_settings.loader, image_settings.workers, image_settings.cache, image_settings.memory_gb
        return Loader(data.images(part), config, augment, values["seed"], device, *how)

    calibration = calibration_batches(
        loader("supernet", True), evaluation.bn_batches, evaluation.bn_batch_size, values["seed"], image_settings.cache
    )
    validation = loader(values.get("split", "search"), False)
    return supernet, calibration, validation_batches(validation, image_settings.eval_batch_size, image_settings.cache)


def load_supernet(path, **settings):
    """As `open_evaluation`, in Python: of a checkpoint, with settings of tester.py by name, others have their defaults.

    supernet, calibration, validation = load_supernet("checkpoints/supernet/checkpoint-0150000.pth", data_dir="...")
    """
    subjects = (Run, DataConfig, Images, Evaluation, Testing)
    known = {field.name: field.default for subject in subjects for field in dataclasses.fields(subject)}
    if unknown := sorted(settings.keys() - known.keys()):
        raise UserError(f"load_supernet has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return open_evaluation(known | DataConfig.unset() | {"checkpoint": path, "own": None} | settings)


def evaluate(supernet, candidates, calibration, validation, bn="ema", fold=True, amp="off"):
    """Recalibrates BN for each candidate and measures its accuracy; computes what candidates have in common once.

    The nodes of the tree have BN statistics of their own, which begin at mean 0 and variance 1. A forward pass attaches
    them to the supernet's norms, node by node, so that `update_bn` updates them.

    Returns a dict for each candidate, in order: architecture, acc1 and acc5 in percent, loss (mean cross-entropy in
    nats, None if it is not finite), n_images, seconds (its share); where `validation` tells two halves of its images
    apart, halves has acc1 and loss of each; where it knows groups, acc1_error is the standard error of acc1 by these.
    `calibration` and `validation` yield batches (images (N, 3, H, W), labels (N,)), the same at every iteration. With
    `fold`, BN is folded into the convolutions for validation; `amp` "bf16" computes convolutions in bfloat16. The
    supernet is left in eval mode with its own BN statistics. Raises UserError if a candidate is not of its space.
    """
    start = time.perf_counter()
    candidates = [supernet.space.check(c) for c in candidates]
    tree = PrefixTree(supernet, candidates, fold, amp)  # its nodes have fresh BN statistics
    with torch.inference_mode(), tree.own_statistics():
        update_bn(supernet, tree.forward, calibration, bn)
        sums, n_images, n_second = dict.fromkeys(candidates, 0), 0, 0
        sizes, groups = getattr(validation, "groups", None) or (torch.empty(0), itertools.repeat(None))
        halves = getattr(validation, "second_halves", itertools.repeat(None))
        for (images, labels), second, group in zip(validation, halves, groups):
            if second is None:
                second = torch.zeros_like(labels, dtype=torch.bool)
            second = second.to(labels.device, non_blocking=True)
            group = None if group is None else group.to(labels.device, non_blocking=True)
            for candidate, logits in tree.logits(images):
                sums[candidate] = sums[candidate] + _counts(logits, labels, second, group, len(sizes))
            n_images += len(labels)
            n_second += second.sum()
    counts, n_images = _all_reduce_counts(list(sums.values()), n_images, 6 + len(sizes))
    n_second = distributed.all_reduce_sum(torch.as_tensor(n_second).cpu()).item()
    counts = dict(zip(sums, counts))
    seconds = round((time.perf_counter() - start) / len(candidates), 3)
    return [_result(c, counts[c], n_images, n_second, sizes, seconds) for c in candidates]


def _counts(logits, labels, second, group, n_groups):
    """Images correct in top-1 and top-5 and their losses, summed over all and over the `second` half; then those
    correct in top-1 by group: a tensor (6 + n_groups,)."""
    hits = _hits(logits, labels)
    each = torch.stack((hits[:, 0].double(), hits.any(1).double(), losses(logits, labels)), 1)
    sums = torch.cat((each.sum(0), torch.where(second[:, None], each, 0).sum(0)))
    if group is None:
        return sums
    right = sums.new_zeros(n_groups).index_add_(0, group, each[:, 0])  # whole numbers: their order does not matter
    return torch.cat((sums, right))


def standard_error(hits, sizes):
    """The standard error, in percent, of the share of hits, from the numbers of hits and of images of groups (G,).

    Images of a group count together, as they are right or wrong together. Source: Liang and Zeger, Longitudinal data
    analysis using generalized linear models, 1986.
    """
    n, g = sizes.sum(), len(sizes)
    residuals = hits - sizes * (hits.sum() / n)
    return (100 * (residuals.square().sum() * g / max(1, g - 1)).sqrt() / n).item()


def _result(candidate, counts, n_images, n_second, sizes, seconds):
    whole, second, hits = counts.split((3, 3, len(sizes)))
    acc1, acc5, loss = _means(whole, n_images)
    found = {"architecture": list(candidate), "acc1": acc1, "acc5": acc5, "loss": loss, "n_images": n_images}
    if 0 < n_second < n_images:
        halves = _means(whole - second, n_images - n_second), _means(second, n_second)
        found["halves"] = {"acc1": [acc1 for acc1, _, _ in halves], "loss": [loss for _, _, loss in halves]}
    if len(sizes):
        found["acc1_error"] = standard_error(hits, sizes)
    return found | {"seconds": seconds}


def _means(counts, n_images):
    """(top-1 in percent, top-5 in percent, loss in nats or None) of counts of `_counts`."""
    units = torch.tensor([100, 100, 1 / LOSS_UNITS], dtype=torch.double)
    acc1, acc5, loss = (counts * units / n_images).tolist()
    return acc1, acc5, loss if math.isfinite(loss) else None  # JSON has no NaN


def evaluate_in_lists(supernet, candidates, *args, **how):
    """Yields the results of `evaluate`, a few candidates at a time, so that an interruption loses only a few."""
    for few in cut(supernet.space, map(supernet.space.check, candidates)):
        yield from evaluate(supernet, few, *args, **how)


def recalibrate_bn(model, forward, batches, bn="ema", sharded=False):
    """Resets the BN statistics of one network and recalculates them by `forward(images)` over the batches.

    For candidates of a supernet see `evaluate`.
    `batches` yields (images, labels). For `bn` see `bn_momentum`. With `sharded`, each rank has batches of its own, and
    the ranks' plain averages are averaged. Dropout stays off; the model is left in eval mode.
    """
    norms = batch_norms(model)
    for norm in norms:
        norm.reset_running_stats()
    n = update_bn(model, forward, batches, bn)
    if sharded:
        distributed.all_reduce_mean([t for norm in norms for t in (norm.running_mean, norm.running_var)], n)


def update_bn(model, forward, batches, bn="ema"):
    """Updates the BN statistics of `model` by `forward(images)` over the batches; returns the number of batches.

    Meanwhile BN is in training mode and everything else in eval mode; the model is left in eval mode.
    """
    norms = batch_norms(model.eval())
    n = 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
    with torch.inference_mode():
        for n, (images, _) in enumerate(batches, 1):
            for norm in norms:
                norm.momentum = bn_momentum(bn, n)
            forward(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.eval()
    return n


def bn_momentum(bn, n):
    """BN momentum of the n-th calibration batch, for a value of --bn.

    "ema": 0.1, an exponential average that sees about the last 19 batches (official).
    "average": 1 / n, the plain average of all.
    """
    return 0.1 if bn == "ema" else 1 / n


def correct_counts(logits, labels):
    """Numbers of images correct in top-1 and top-5, as a tensor (2,) on the device, without synchronisation."""
    hits = _hits(logits, labels)
    return torch.stack((hits[:, 0].sum(), hits.sum()))


def _hits(logits, labels):
    """Whether each of the five highest logits is that of the label: bools (N, 5)."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]


LOSS_UNITS = 1_000_000  # in one nat


def losses(logits, labels):
    """The images' cross-entropies (N,) in whole LOSS_UNITS, so that neither their order nor batches change the sum."""
    return (torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none") * LOSS_UNITS).round()


def accuracy(forward, batches):
    """(top-1 percent, top-5 percent, number of images), exact over ragged batches and over all ranks.

    `forward(images)` returns logits (N, classes) of a model in eval mode.
    """
    counts, n_images = 0, 0
    with torch.inference_mode():
        for images, labels in batches:
            counts = counts + correct_counts(forward(images), labels)
            n_images += len(labels)
    counts, n_images = _all_reduce_counts([counts], n_images, 2)
    top1, top5 = (counts[0] * 100 / n_images).tolist()
    return top1, top5, n_images


def _all_reduce_counts(counts, n_images, width):
    """Sums over all ranks: of `counts`, a tensor (width,) per candidate, as (candidates, width); and of n_images."""
    here = torch.zeros(len(counts), width, dtype=torch.double)
    if n_images:
        here += torch.stack(counts).cpu()
    return distributed.all_reduce_sum(here), distributed.all_reduce_sum(torch.tensor(n_images)).item()


def resolve_device(name="auto", threads=None):
    """The torch device of "auto", "cpu" or "cuda"; sets CPU threads and makes cuDNN deterministic (official search).

    Raises UserError for "cuda" without a GPU.
    """
    if threads:
        torch.set_num_threads(threads)
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(NO_GPU)
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = device.type == "cuda"
    return device
