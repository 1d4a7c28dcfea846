"""What a training step of a joint path costs beside one of the narrow network: `python bench/width_step.py`.

For 20 random paths of operations and widths at 224 px: a step of the supernet, which slices its weights, and one of
the stand-alone network of these channels, in turns, batch 32, both by training/recipe.py. Prints the median ratio
and writes bench/results/width_step.json; some ten minutes on two cores.
"""

import argparse
import pathlib
import random
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils

# isort: split
import torch

from network import ShuffleNetV2, ShuffleNetV2OneShot
from space.custom import WIDTHS
from space.search_space import SearchSpace
from training.recipe import Recipe

RESULTS = ROOT / "bench" / "results" / "width_step.json"
SETTINGS = {
    "iterations": 1000, "lr": 0.01, "warmup": 0, "momentum": 0.9, "weight_decay": 4e-5, "label_smoothing": 0.1,
    "amp": "off", "seed": 0,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--paths", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each, after one that is not (3)")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    space, rng = SearchSpace(input_size=args.input_size, widths=WIDTHS), random.Random(0)
    images = torch.rand(args.batch_size, 3, args.input_size, args.input_size, device=device) * 255
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(args.batch_size, device=device) % space.n_classes

    def recipe(model):
        model.to(device, memory_format=torch.channels_last).train()
        return Recipe(model, argparse.Namespace(**SETTINGS), device)

    supernet, rows = recipe(ShuffleNetV2OneShot(space=space)), []
    for _ in range(args.paths):
        candidate = space.random_candidate(rng)
        narrow = recipe(ShuffleNetV2(candidate, affine=False, space=space))
        seconds = {"sliced": [], "narrow": []}
        for step in range(1, args.steps + 2):
            for name, trained, path in (("sliced", supernet, candidate), ("narrow", narrow, None)):
                start = time.perf_counter()
                loss, _ = trained.train_one_step(step, images, labels, path)
                loss.item()  # waits for the device
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        rows.append({"architecture": candidate, "flops": space.flops(candidate), **medians})
    ratio = statistics.median(row["sliced"] / row["narrow"] for row in rows)
    settings = {
        "batch_size": args.batch_size,
        "input_size": args.input_size,
        "steps": args.steps,
        "device": str(device),
    }
    settings |= {"threads": torch.get_num_threads(), "versions": utils.versions(), "commit": utils.commit()}
    utils.write_json(args.results, {"settings": settings, "median_ratio": ratio, "paths": rows}, indent=1)
    sliced, narrow = (statistics.median(row[name] for row in rows) * 1000 for name in ("sliced", "narrow"))
    print(f"sliced {sliced:.0f} ms, narrow {narrow:.0f} ms a step; median ratio of {args.paths} paths {ratio:.3f}")


if __name__ == "__main__":
    main()
