"""Trains the supernet: at every step one path, drawn flat over FLOPs bins.

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
import pathlib
import random

import torch

import command_line
import distributed
from dataloader import Loader
from images.dataset import DataConfig, check_batch_size, open_data
from images.image_cache import calibration_batches, validation_batches
from network import ShuffleNetV2OneShot
from space.custom import space_from_args
from space.sampler import PathSampler, default_flops_range
from training.evaluation import evaluate, resolve_device
from training.loop import train
from training.run import TrainingRun


def parse_args(argv=None):
    parser = command_line.Parser(__doc__, "supernet")
    command_line.add_run_flags(parser)
    command_line.add_data_flags(parser)
    command_line.add_training_flags(parser, iterations=150_000)
    command_line.add_evaluation_flags(parser)
    command_line.add_space_flags(parser)
    command_line.add_architecture_flag(parser, default="none; --space channels keeps its operations")
    flag, count = parser.add_argument_group("paths").add_argument, command_line.count(1, 1000)
    samplers = ("flops-uniform", "uniform")
    flag("--sampler", choices=samplers, default=samplers[0], help="default: flat over FLOPs bins")
    flag("--flops-range", nargs=2, metavar=("LOW", "HIGH"), help="of the bins, as 290M or 0.14%% (290M 360M at 224 px)")
    flag("--flops-bins", type=count, default=7, metavar="N", help="default: 7")
    warmup = "steps in which paths widen from the widest downwards, where widths are chosen (a quarter of all)"
    flag("--width-warmup", type=command_line.count(0), metavar="N", help=warmup)
    flag("--val-paths", type=count, default=3, metavar="N", help="fixed paths to validate (default: 3)")
    args = parser.parse(argv)
    if args.sampler == "uniform":
        parser.refuse("--sampler uniform", "flops-range", "flops-bins")
    if args.space != "channels":
        parser.refuse("a --space other than channels", "architecture")
    return args


def main(args):
    config = DataConfig.from_args(args)
    data = distributed.local_rank0_first(lambda: open_data(args, config))
    device = resolve_device(args)
    space = space_from_args(args, config.input_size, len(data.classes))
    flops_range = None
    if args.sampler == "flops-uniform":
        flops_range = list(default_flops_range(space))
        if args.flops_range:
            flops_range = [space.flops_value(v, "--flops-range") for v in args.flops_range]
    if args.width_warmup and space.n_widths == 1:
        raise utils.UserError(f"--width-warmup {args.width_warmup}: this search space has no widths to choose from")
    width_warmup = args.iterations // 4 if args.width_warmup is None else args.width_warmup
    sampler = PathSampler(space, args.seed, flops_range, args.flops_bins, width_warmup if space.n_widths > 1 else 0)

    images, heldout = data.images("supernet"), data.images("search")
    check_batch_size(len(images), args.batch_size)
    loader = Loader.from_args(images, config, True, args, device)
    calibration = calibration_batches(images, config, args, device)
    validation = validation_batches(heldout, config, args, device)
    folder = pathlib.Path(args.out) / "checkpoints" / "supernet"
    run = TrainingRun(args, folder, device, "supernet", {
        "space": space.to_dict(), "data": config.to_dict(), "split": data.split, "classes": list(data.classes),
        "flops_range": flops_range,
    })  # fmt: skip
    run.start(data)
    if flops_range:
        low, high = (flops / 1e6 for flops in flops_range)
        utils.log.info("paths: flat over %d bins in %.1fM to %.1fM multiply-adds", args.flops_bins, low, high)
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

    metrics = train(run, model, loader, validate, sampler.candidate)
    if distributed.rank() == 0:
        utils.log.info("next: %s", command_line.command("tester.py", args, "--mode", "gen"))
        print(json.dumps(metrics))


if __name__ == "__main__":
    distributed.run(main, parse_args)
