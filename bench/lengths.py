"""How long a comparison of networks must be: do they keep their order from a share of the steps to all of them?

    python data/make_letters.py
    python -m bench.lengths                      half an hour on one core; the same command resumes
    python -m bench.lengths --steps 1600         two hours more, in which whole trainings are four times as long
    python -m bench.lengths --report             the numbers of docs/experiments.md; with --steps, of that length

In the space `varied`, on the bundled images and on letters: the winner of a search, the largest legal network and six
random legal ones are trained for 1/8, 1/4, 1/2 of the steps and all of them, each time with a whole schedule, without
the images held out. Of the bundled images the winner is that of bench/worth.py, of the letters that of a supernet of
2,000 steps. A comparison goes by the held-out images; what it is worth is measured on val. One process has the images
in memory, since decoding them takes longer than a step. Writes bench/results/lengths.json.
"""

import itertools
import json
import pathlib
import statistics
import time

import numpy as np
import torch
from PIL import Image

import utils
from bench import study
from dataloader import from_tensors
from images.dataset import Data, evaluation_plan, training_plan
from network import ShuffleNetV2, ShuffleNetV2OneShot
from settings.fields import count
from settings.subjects import DataConfig, Training
from space.custom import make_space
from space.evolution import Evolution
from space.limits import make_bounds
from space.sampler import PathSampler
from training.evaluation import accuracy, calibration_batches, evaluate, recalibrate_bn
from training.loop import train

RESULTS = study.RESULTS / "lengths.json"
SETS = {  # folder below data/, and how its images are split and augmented
    "bundled": ("fashion-mnist", DataConfig(28, 28, heldout_per_class=100)),
    "letters": ("letters", DataConfig(28, 28, heldout_per_class=60, mirror=False, group_by="(.*)_")),
}
SHARES = (8, 4, 2, 1)  # --steps, each of 64 images, is divided by these
ORDER = (("bundled", 0), ("letters", 0), ("letters", 1), ("bundled", 1))  # set and seed
RANDOM = 6  # candidates
BN_PASS = 30  # batches
SHIFT = 3  # px
SUPERNET = 2000  # steps
EVOLUTION = {"population": 24, "select": 6, "mutation": 12, "crossover": 12, "generations": 5}


class Images:
    """The images of a set in memory, its space and its candidates."""

    def __init__(self, name, folder):
        self.name = name
        where, self.config = SETS[name]
        self.data = Data(folder / where, self.config)
        self.space = make_space("varied", input_size=28, n_classes=len(self.data.classes))
        self.bounds = make_bounds(self.space)
        self.parts = {part: self._read(part) for part in ("supernet", "search", "val")}

    def _read(self, part):
        images = self.data.images(part)
        pixels = [np.asarray(Image.open(pathlib.Path(images.root, path)).convert("L")) for path in images.paths]
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.asarray(images.labels))

    def loader(self, part, seed=None):
        """A loader of a part; with a seed, images are shifted by up to SHIFT px and, where the set allows, mirrored."""
        pixels, labels = self.parts[part]

        def made(batch, samples):
            batch = batch.float()
            if seed is None:
                return batch
            rng = np.random.default_rng([seed, *samples[0].tolist()])
            around = torch.nn.functional.pad(batch, (SHIFT,) * 4, mode="replicate")
            corners = rng.integers(2 * SHIFT + 1, size=(len(batch), 2)).tolist()
            side = batch.shape[-1]
            shifted = torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(around, corners)])
            flips = torch.from_numpy(rng.random(len(batch)) < 0.5 * self.config.mirror)
            return torch.where(flips[:, None, None, None], shifted.flip(-1), shifted)

        return from_tensors(pixels[:, None].expand(-1, 3, -1, -1), labels, made)

    def trained(self, candidate, steps, seed):
        """Top-1 on the held-out images and on val after `steps` steps, {"heldout": percent, "val": percent}."""
        torch.manual_seed(seed)
        model = ShuffleNetV2(candidate, space=self.space)
        loader = self.loader("supernet", seed)
        train(model, loader, settings(steps, 0.05), seed=seed)
        plan = training_plan(len(loader.images), 64, seed, steps, steps + BN_PASS)
        recalibrate_bn(model, model, loader.batches(plan), "average")
        return {name: self.measured(model, part) for name, part in (("heldout", "search"), ("val", "val"))}

    def measured(self, model, part):
        loader = self.loader(part)
        return accuracy(model.eval(), loader.batches(evaluation_plan(len(loader.images), 200)))[0]

    def winner(self, seed=0):
        """The winner of a search by loss in a supernet of SUPERNET steps."""
        torch.manual_seed(seed)
        supernet = ShuffleNetV2OneShot(space=self.space)
        loader = self.loader("supernet", seed)
        train(supernet, loader, settings(SUPERNET, 0.1), PathSampler(self.space, seed), seed=seed)
        calibration = calibration_batches(loader, 8, 128, seed)
        heldout = self.loader("search")
        validation = list(heldout.batches(evaluation_plan(len(heldout.images), 200)))
        flops = self.bounds["flops"][1]
        evolution = Evolution.from_settings(self.space, EVOLUTION | {"flops_limit": flops, "seed": seed})
        while population := evolution.ask():
            found = evaluate(supernet, population, calibration, validation, "average")
            evolution.tell({tuple(row["architecture"]): -row["loss"] for row in found})
        return evolution.best[0]


def settings(steps, lr):
    """Those of bench/varied_fashion.yml; the warm-up is a share of the steps."""
    return Training(iterations=steps, batch_size=64, lr=lr, warmup=steps // 10, val_every=steps)


# --- rows -----------------------------------------------------------------------------------------------------


def candidates(images, rows, keep):
    """{who: candidate}; the winner of the letters is searched for, and kept as a row."""
    name = images.name
    found = [row["architecture"] for row in rows if row["set"] == name and row["who"] == "winner"]
    if not found and name == "bundled":
        rows_of_worth = study.read(study.RESULTS / "worth.json")["rows"]
        key = ["varied_fashion", "retraining", 0, "59%", "winner", 1]
        found = [row["architecture"] for row in rows_of_worth if row["key"] == key]
    if not found:
        start = time.process_time()
        found = [list(images.winner())]
        seconds = round(time.process_time() - start, 1)
        keep({"set": name, "who": "winner", "architecture": found[0], "cpu_seconds": seconds})
    largest = study.largest_legal(images.space, images.bounds["flops"][1])
    chosen = {"winner": tuple(found[0]), "largest": largest}
    drawn = study.random_legal(images.space, images.bounds, RANDOM + 2)
    others = [candidate for candidate in drawn if candidate not in chosen.values()]
    return chosen | {f"random {i}": candidate for i, candidate in enumerate(others[:RANDOM], 1)}


def run(options, rows):
    def keep(row):
        rows.append(row)
        study.write(options.results, {"rows": rows})
        print(json.dumps(row), flush=True)

    opened = {}
    for name, seed in ORDER:
        images = opened[name] = opened.get(name) or Images(name, options.data_dir)
        for (who, candidate), share in itertools.product(candidates(images, rows, keep).items(), SHARES):
            key = {"set": name, "seed": seed, "who": who, "steps": options.steps // share}
            if any(key.items() <= row.items() for row in rows):
                continue
            start = time.process_time()
            numbers = images.trained(candidate, key["steps"], seed)
            seconds = round(time.process_time() - start, 1)
            keep({**key, "architecture": list(candidate), **numbers, "cpu_seconds": seconds})


# --- report ---------------------------------------------------------------------------------------------------


def summary(rows, steps):
    """{set: what the trainings of SHARES of the steps say}, means over the seeds that are complete.

    tau: of held-out top-1 after a share of the steps with top-1 on val after all of them. regret: how far the network
    that has the best held-out top-1 is below the best on val, after all steps, in points. chosen: top-1 on val where
    winner, largest and random 1 are compared at a length and the best is trained as long again, and `alone` that of
    each after four times the length, which costs the same.
    """
    found = {}
    for name, seeds in complete(rows, steps).items():
        by_share = {share: [] for share in SHARES}
        for seed, share in itertools.product(seeds.values(), SHARES):
            truth, heldout = ({who: lengths[steps // n][part] for who, lengths in seed.items()}
                              for n, part in ((1, "val"), (share, "heldout")))  # fmt: skip
            pick = max(heldout, key=heldout.get)
            row = {
                "tau": study.tau([*heldout.values()], [*truth.values()]),
                "regret": max(truth.values()) - truth[pick],
            }
            if share >= 4:
                three = ("winner", "largest", "random 1")
                row["chosen"] = seed[max(three, key=heldout.get)][steps // share]["val"]
                row |= {f"alone: {who}": seed[who][4 * steps // share]["val"] for who in three}
            by_share[share].append(row)
        means = {n: {key: statistics.fmean(r[key] for r in some) for key in some[0]} for n, some in by_share.items()}
        truths = [[lengths[steps]["val"] for lengths in seed.values()] for seed in seeds.values()]
        found[name] = {"seeds": len(seeds), "shares": means, "val": [statistics.fmean(t) for t in zip(*truths)]}
        if len(truths) > 1:
            found[name]["tau of two seeds"] = study.tau(*truths[:2])
    return study.rounded(found)


def complete(rows, steps):
    """{set: {seed: {who: {steps: row}}}} of the seeds of which all trainings of SHARES of the steps are known."""
    found = {}
    for row in rows:
        if "seed" in row:
            seed = found.setdefault(row["set"], {}).setdefault(row["seed"], {})
            seed.setdefault(row["who"], {})[row["steps"]] = row
    wanted = {steps // share for share in SHARES}
    return {
        name: whole
        for name, seeds in found.items()
        if (whole := {n: seed for n, seed in seeds.items()
                      if len(seed) == RANDOM + 2 and all(wanted <= lengths.keys() for lengths in seed.values())})
    }  # fmt: skip


def parse_args(argv=None):
    defaults = {"--data-dir": study.ROOT / "data", "--results": RESULTS}
    parser = study.parser(__doc__, defaults)
    parser.add_argument("--steps", type=count(8), default=400, metavar="N", help="of a whole training (default: 400)")
    parser.add_argument("--report", action="store_true", help="print the numbers")
    return parser.parse_args(argv)


def main(options):
    torch.set_num_threads(1)
    rows = study.read(options.results).get("rows", [])
    if options.report:
        print(json.dumps(summary(rows, options.steps), indent=1))
    else:
        run(options, rows)


if __name__ == "__main__":
    utils.run_script(main, parse_args)
