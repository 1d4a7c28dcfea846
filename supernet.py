"""Trains the supernet: one path per step, drawn flat over FLOPs bins.

    python supernet.py                                  ImageNet at data/imagenet, official settings
    python supernet.py --demo                           the bundled images, minutes on two CPU cores
    python supernet.py --data-dir DIR --input-size 64   any other <class>/<image> tree
    torchrun --nproc-per-node 8 supernet.py             on eight GPUs

Reads DIR/train (without the images held out for the search). Writes OUT/checkpoints/supernet/: checkpoint-STEP.pth,
log.jsonl, run.log, config.yml, tensorboard/. The same command resumes an interrupted run.
Expected on ImageNet: training error about .417 at the end (official log); not run here.
Source: paper section 3.3 and 4.1; official `src/Supernet/train.py`.
"""

import utils  # first: sets GOMP_SPINCOUNT before torch is imported

# isort: split
import copy
import json
import random

import torch

from network import ShuffleNetV2OneShot
from settings.command_line import Parser, command
from settings.subjects import DataConfig, Evaluation, Images, Run, Sampling, Space, Training
from space.custom import make_space
from space.limits import offer, shown
from space.sampler import PathSampler, default_flops_range
from training import distributed
from training.evaluation import calibration_batches, calibration_warning, evaluate
from training.loop import train
from training.start import Start


def make_parser():
    parser = Parser(__doc__, "supernet")
    parser.add(Run)
    parser.add(DataConfig, defaults=DataConfig.unset())
    parser.add(Images)
    parser.add(Training)
    parser.add(Evaluation)
    parser.add(Space, said="none; --space channels keeps its operations")
    parser.add(Sampling)
    return parser


def parse_args(argv=None):
    parser = make_parser()
    args = parser.parse(argv)
    if args.sampler == "uniform":
        parser.refuse("--sampler uniform", "flops-range", "flops-bins")
    if args.space != "channels":
        parser.refuse("a --space other than channels", "architecture")
    return args


def make_sampler(sampling, space, seed, iterations):
    """The PathSampler with the settings `sampling`, for `iterations` steps of training."""
    flops_range = None
    warmup = sampling.width_warmup
    if sampling.sampler == "flops-uniform":
        given = [space.cost_value("flops", text, "--flops-range") for text in sampling.flops_range or ()]
        flops_range = given or default_flops_range(space)
        if not given and flops_range[0] >= flops_range[1]:
            what = f"--sampler flops-uniform: candidates all cost {flops_range[0]} multiply-adds, so there are no bins"
            raise utils.UserError(f"{what}: give --sampler uniform")
    if warmup and space.n_widths == 1:
        raise utils.UserError(f"--width-warmup {warmup}: this search space has no widths to choose from")
    warmup = iterations // 4 if warmup is None else warmup
    return PathSampler(space, seed, flops_range, sampling.flops_bins, warmup if space.n_widths > 1 else 0)


def main(args):
    distributed.join(args.device)
    start = Start("supernet", vars(args))
    classes = len(start.data.classes)
    where = f"{args.config}: space"
    space = make_space(args.space, args.architecture, args.own, start.config.input_size, classes, where)
    sampler = make_sampler(Sampling.of(vars(args)), space, args.seed, args.iterations)
    loader = start.loader("supernet", augment=True)
    calibration = calibration_batches(loader, args.bn_batches, args.bn_batch_size, args.seed, args.cache)
    validation = start.validation("search")
    if text := calibration_warning(Evaluation.of(vars(args)), len(loader.images)):
        start.data.warnings.append(text)
    run = start.run(space, loader, split=start.data.split, flops_range=sampler.flops_range)
    if start.data.grouping:
        utils.log.info(start.data.grouping)
    utils.log.info("space: %s", offer(space))
    if sampler.flops_range:
        low, high = (shown("flops", flops) for flops in sampler.flops_range)
        utils.log.info("paths: flat over %d bins in %s to %s multiply-adds", args.flops_bins, low, high)
    rng = random.Random(args.seed)
    fixed_paths = [space.random_candidate(rng) for _ in range(args.val_paths)]

    torch.manual_seed(args.seed)
    model = ShuffleNetV2OneShot(space=space)

    def validate(step):
        distributed.together(lambda: [calibration.prepare(), validation.prepare()])
        results = evaluate(copy.deepcopy(model), fixed_paths, calibration, validation, args.bn, amp=args.eval_amp)
        acc1, acc5 = (sum(r[k] for r in results) / len(results) for k in ("acc1", "acc5"))
        text = "step %d  search images: top-1 %.2f%%, top-5 %.2f%%, mean of %d fixed paths"
        utils.log.info(text, step, acc1, acc5, len(results))
        return {"val/acc1": acc1, "val/acc5": acc5}

    metrics = train(model, loader, start.training, sampler, validate, run, device=start.device, seed=args.seed)
    if distributed.rank() == 0:
        utils.log.info("next: %s", command("tester.py", Run.of(vars(args)), args.own, "--mode", "gen"))
        print(json.dumps(metrics))


if __name__ == "__main__":
    distributed.run(main, parse_args)
