"""Measures the cost of averaging gradients: `torchrun --nproc-per-node 2 bench/exchange.py`, one rank a GPU, or on
CPU cores.

The same steps are taken in turns without any exchange, with that of distributed.py (one all-reduce of the gradients
of the step's path), and with DistributedDataParallel (find_unused_parameters: gradients of all operations, in
buckets, overlapping with the backward pass). Prints a Markdown table of medians and writes
bench/results/exchange.json. Needs neither DALI nor NNI nor images.
"""

import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils

# isort: split
import command_line
import torch
from torch import nn

import distributed
from network import ShuffleNetV2OneShot
from space.sampler import PathSampler, default_flops_range
from space.search_space import SearchSpace
from training.evaluation import resolve_device
from training.recipe import begin_momentum, parameter_groups

EXCHANGES = ("none", "the path's gradients", "DistributedDataParallel")


def parse_args():
    parser = command_line.Parser(__doc__, "exchange")
    parser.add_argument("--batch-size", type=int, default=16, help="images a rank (default: 16)")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "exchange.json")
    return parser.parse_args()


def main(options):
    device = resolve_device(options)
    space = SearchSpace.for_images(options.input_size, 1000)
    sampler, criterion = PathSampler(space, 0, default_flops_range(space)), nn.CrossEntropyLoss(label_smoothing=0.1)
    models, optimizers, seconds = {}, {}, {name: [] for name in EXCHANGES}
    for name in EXCHANGES:
        torch.manual_seed(0)
        models[name] = ShuffleNetV2OneShot(space=space).to(device, memory_format=torch.channels_last).train()
        optimizers[name] = torch.optim.SGD(parameter_groups(models[name], 4e-5), lr=0.01, momentum=0.9, fused=True)
    models[EXCHANGES[2]] = nn.parallel.DistributedDataParallel(
        models[EXCHANGES[2]], find_unused_parameters=True, forward_sync_buffers=False
    )
    images = torch.rand(options.batch_size, 3, options.input_size, options.input_size, device=device).mul_(255)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (options.batch_size,), device=device)
    for step in range(options.steps + 1):
        for name in EXCHANGES:
            distributed.all_reduce_max(0)  # makes the ranks start together
            start = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            criterion(models[name](images, sampler.candidate(step)), labels).backward()
            if name == EXCHANGES[1]:
                distributed.average_gradients(models[name].parameters())
            begin_momentum(optimizers[name])
            optimizers[name].step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if step:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    if distributed.rank():
        return
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    sent = {
        EXCHANGES[1]: space.params(sampler.candidate(0)),
        EXCHANGES[2]: sum(p.numel() for p in models[EXCHANGES[0]].parameters()),
    }
    print("| exchange | ms a step | over none, ms | MB of gradients |\n|---|---|---|---|")
    for name, s in medians.items():
        print(f"| {name} | {1000 * s:.0f} | {1000 * (s - medians['none']):.0f} | {4e-6 * sent.get(name, 0):.1f} |")
    result = {
        "medians": medians,
        "seconds": seconds,
        "processes": distributed.world_size(),
        "batch_size": options.batch_size,
        "input_size": options.input_size,
        "commit": utils.commit(),
        "versions": utils.versions(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    utils.write_json(options.results, result, indent=1)


if __name__ == "__main__":
    distributed.run(main, parse_args)
