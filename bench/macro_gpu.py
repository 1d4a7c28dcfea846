"""Ways to train a supernet that ranks NAS-Bench-Macro better, on one GPU, many supernets side by side.

    python -m bench.macro_gpu                          half width, a million images each: all ways, two seeds
    python -m bench.macro_gpu --full                   full width, 100 epochs, two seeds
    python -m bench.macro_gpu --ways "strictly fair"   some ways; on a CPU, an hour of one core each

The images are decoded once and stay in the GPU's memory, since so small a network would wait for any loader; shifts of
up to 4 px and flips augment them, as in the published trainings. A process trains a supernet, keeps checkpoints, and
scores all 3,969 networks; `--jobs` of them run at a time, and the same command resumes. Writes the scores into --out,
and bench/results/macro_gpu.json; prints the tables of docs/experiments.md.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys

import numpy as np
import torch
from PIL import Image

import supernet as supernet_script
import utils
from bench import macro, study
from bench.study import ROOT, agreement
from dataloader import from_tensors
from images.dataset import calibration_plan, evaluation_plan
from network import ShuffleNetV2OneShot
from settings.subjects import DataConfig, Training
from space import weight_files
from space.custom import make_space
from space.sampler import PathSampler
from training import checkpoint
from training.evaluation import resolve_device
from training.loop import train
from training.run import TrainingRun, contents_of
from training.step import single_path

RESULTS = study.RESULTS / "macro_gpu.json"
IMAGES = 1_024_000  # in a training of half width, as in bench/macro.py
FULL_IMAGES, FULL_LR = 5_000_000, 0.2
HELD_OUT = 200  # images of each class
CLASSES = 10
PADDING = 4  # px
AUGMENT, PATHS = 0x41756720, 0x46616972  # separate these draws from others of the same seed
SCORED = 1000  # images of a forward pass that scores
CALIBRATED = 1  # batches of as many training images
SAVE_EVERY, KEEP = 500, 40  # steps, checkpoints


@dataclasses.dataclass(frozen=True)
class Way:
    """How a supernet is trained: its settings, and the paths of a step."""

    batch_size: int = 64  # images of a path
    lr: float = 0.1
    amp: str = "off"
    width: float = 0.5  # share of the published channels
    images: int = IMAGES
    fair: bool = False  # the paths of a step have every operation of each block once
    distinct: bool = False  # paths are uniform over the distinct networks, in the form that is scored
    first: tuple = ()  # operations that the first block may have; empty: all

    @property
    def paths(self):
        return 3 if self.fair else 1


SPLIT = ("split: identity", "split: inverted residuals")
WAYS = {
    "baseline": Way(),
    "distinct networks": Way(distinct=True),
    "strictly fair": Way(fair=True),
    "batches of 256": Way(batch_size=256),
    "batches of 256, learning rate 0.2": Way(batch_size=256, lr=0.2),
    SPLIT[0]: Way(first=(0,), images=IMAGES // 2),
    SPLIT[1]: Way(first=(1, 2), images=IMAGES // 2),
}


def full(way, amp="bf16"):
    """A way at full width, with more images and larger batches."""
    images = way.images * FULL_IMAGES // IMAGES
    return dataclasses.replace(way, batch_size=512 // way.paths, lr=FULL_LR, amp=amp, width=1.0, images=images)


FULL_WAYS = {
    "baseline": full(WAYS["baseline"]),
    "float32": full(WAYS["baseline"], "off"),
    **{name: full(WAYS[name]) for name in ("distinct networks", "strictly fair", *SPLIT)},
}


# --- images in memory -----------------------------------------------------------------------------------------


def decoded(tree, file):
    """{"train", "train_labels"} of a class tree: pixels (N, H, W, 3) RGB, and labels; `file` keeps them."""
    if not file.exists():
        folders = sorted(path for path in (tree / "train").iterdir() if path.is_dir())
        paths = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]
        pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in paths])
        arrays = {"train": pixels, "train_labels": np.array([label for _, label in paths])}
        with utils.atomic_write(file, "wb") as stream:
            np.savez(stream, **arrays)
    with np.load(file) as arrays:
        return dict(arrays)


def shifted(images, samples, seed=0):
    """Images (N, C, H, W), each cut by PADDING px on each side after a shift of up to as many; half are flipped."""
    rng = np.random.default_rng([seed, AUGMENT, *samples[0].tolist()])
    draws = [rng.integers(n, size=len(images)) for n in (2 * PADDING + 1, 2 * PADDING + 1, 2)]
    top, left, flip = torch.from_numpy(np.stack(draws)).to(images.device, non_blocking=True)
    rows, window = (torch.arange(n, device=images.device) for n in (len(images), images.shape[-1] - 2 * PADDING))
    x = torch.where(flip[:, None] == 1, window.flip(0), window) + left[:, None]
    y = window + top[:, None]
    return images[rows[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def loaders(arrays, device, seed=0):
    """The loaders of CIFAR-10 in memory, for the supernet and for its scores: BGR (N, 3, H, W) in [0, 255].

    `arrays` are those of `decoded`; the last HELD_OUT images of each class are for scores, the others are augmented.
    """
    pixels = torch.from_numpy(arrays["train"][..., ::-1].copy()).permute(0, 3, 1, 2)
    labels = torch.from_numpy(arrays["train_labels"].astype(np.int64))
    heldout = torch.cat([(labels == c).nonzero()[-HELD_OUT:, 0] for c in range(CLASSES)])
    others = torch.ones(len(labels), dtype=torch.bool)
    others[heldout] = False
    padded = torch.nn.functional.pad(pixels[others], 4 * [PADDING]).to(device)
    augment = functools.partial(shifted, seed=seed)
    return (from_tensors(padded, labels[others].to(device), augment, device),
            from_tensors(pixels[heldout].to(device), labels[heldout].to(device), device=device))  # fmt: skip


# --- training -------------------------------------------------------------------------------------------------


def sampler_of(way, space, seed):
    """The candidate of a step, a pure function of seed and step."""
    uniform = PathSampler(space, seed)
    networks = macro.some_distinct() if way.distinct else ()

    def candidate(step):
        rng = np.random.default_rng([seed, PATHS, step])
        if networks:
            return tuple(map(int, networks[rng.integers(len(networks))]))
        found = uniform.candidate(step)
        return (int(rng.choice(way.first)), *found[1:]) if way.first else found

    return candidate


def strictly_fair(step, candidate, images, labels):
    """Paths that together have every operation of each block once, each on its share of the images."""
    rng, outputs = step.rng, []
    paths = list(zip(*(rng.sample(range(n), n) for n in step.space.choices)))
    for path, *batch in zip(paths, images.chunk(len(paths)), labels.chunk(len(paths))):
        ((loss, logits),) = single_path(step, path, *batch)
        outputs.append(logits.detach())
        yield loss, torch.cat(outputs)


def supernet_of(way, space, seed):
    """The supernet of a way. What all paths of a step share gets the mean of their gradients: no rule can say that."""
    torch.manual_seed(seed)
    model = ShuffleNetV2OneShot(space=space)
    operations = set(model.features.parameters())
    for parameter in model.parameters():
        if way.paths > 1 and parameter not in operations:
            parameter.register_hook(lambda gradient: gradient / way.paths)
    return model


def train_supernet(way, seed, folder, loader, args):
    """Trains a supernet in a folder, or resumes its training."""
    batch_size = way.batch_size * way.paths
    iterations = max(1, int(args.share * way.images) // batch_size)
    settings = argparse.Namespace(data_dir=args.data_dir, width=way.width, iterations=iterations, threads=args.threads)
    words = map(str, macro.write_settings(folder, settings))
    parsed = vars(supernet_script.parse_args([*words, "--seed", str(seed)]))
    parsed |= {"batch_size": batch_size, "lr": way.lr, "amp": way.amp}
    parsed |= {"save_every": SAVE_EVERY, "keep": KEEP}
    config = DataConfig.resolve(DataConfig.given(parsed))
    space = make_space(parsed["space"], None, parsed["own"], config.input_size, CLASSES)
    contents = contents_of(space, config, map(str, range(CLASSES)))
    run = TrainingRun(folder / "checkpoints" / "supernet", "supernet", contents, {"way": repr(way)})
    rule = strictly_fair if way.fair else "spos"
    train(supernet_of(way, space, seed), loader, Training.of(parsed), sampler_of(way, space, seed), run=run,
          device=loader.device, seed=seed, rule=rule)  # fmt: skip


# --- scores ---------------------------------------------------------------------------------------------------


def score(folder, images, heldout, networks):
    """Writes the scores of networks in the last checkpoint of a folder: mean loss, and top-1 in percent.

    `images` is the loader that calibrates, `heldout` that of the scores.
    """
    file = checkpoint.newest(folder / "checkpoints" / "supernet")
    supernet, _ = checkpoint.load_supernet(file, None)
    supernet.to(heldout.device, memory_format=torch.channels_last)
    calibration = list(images.batches(calibration_plan(images.images.labels, CALIBRATED, SCORED, 0)))
    validation = list(heldout.batches(evaluation_plan(len(heldout.images), SCORED)))
    rows = {n: [loss, acc1] for n, acc1, loss in macro.measure(supernet, networks, calibration, validation, "average")}
    seconds = weight_files.load_file(file)["metrics"]["seconds"]
    utils.write_json(folder / "scores.json", {"seconds": seconds, "scores": rows}, indent=None)


def read_scores(args, name, seed):
    """({network: mean loss}, {network: top-1}, seconds of training) of a way, or None where it is not done."""
    files = [folder_of(args, part, seed) / "scores.json" for part in parts_of(name)]
    if not all(file.exists() for file in files):
        return None
    parts = [utils.read_json(file) for file in files]
    scores = {}
    for way, part in zip(SPLIT, parts):
        first = {str(operation) for operation in WAYS[way].first} if name == SPLIT else set("012")
        scores |= {network: row for network, row in part["scores"].items() if network[0] in first}
    loss, acc1 = ({network: row[i] for network, row in sorted(scores.items())} for i in (0, 1))
    return loss, acc1, sum(part["seconds"] for part in parts)


# --- jobs -----------------------------------------------------------------------------------------------------


def folder_of(args, name, seed):
    slug = "".join(c if c.isalnum() or c == "." else "-" for c in name)
    return args.out / f"{'full' if args.full else 'half'}-{slug}-{seed}"


def work(args, name, seed):
    """Trains and scores a supernet of a way; what is done already is skipped."""
    folder = folder_of(args, name, seed)
    device = resolve_device(args.device, args.threads)
    images = loaders(decoded(args.data_dir, args.images), device, seed)
    train_supernet(ways(args)[name], seed, folder, images[0], args)
    if not (folder / "scores.json").exists():
        score(folder, *images, macro.some_distinct(args.networks))


def ways(args):
    return FULL_WAYS if args.full else WAYS


def side_by_side(args, jobs):
    """Runs the jobs, pairs of a way and a seed, `--jobs` at a time, in their order."""
    own = ["-m", "bench.macro_gpu", *sys.argv[1:], "--job"]
    commands = {f"{way}, seed {n}": ([*own, way, n], folder_of(args, way, n) / "output.txt") for way, n in jobs}
    study.side_by_side(commands, args.jobs)


def parts_of(name):
    return SPLIT if name == SPLIT else (name,)


def names(args):
    """The ways, the baseline first; the two supernets of the split are one."""
    return [*(name for name in ways(args) if name not in SPLIT), SPLIT]


# --- the report -----------------------------------------------------------------------------------------------


def taus(args, name, seed, baseline=None):
    """What the scores of a supernet are worth, and by loss the gain over another's; None if it is not done."""
    if (found := read_scores(args, name, seed)) is None:
        return None
    loss, acc1, seconds = found
    truth = macro.load_truth()
    true = [truth[network]["mean_acc"] for network in loss]
    losses = [-value for value in loss.values()]
    row = {"loss": agreement([losses], true), "top-1": agreement([list(acc1.values())], true)}
    if baseline:
        row["gain"] = agreement([losses], true, [-baseline[0][network] for network in loss])
    spread = [statistics.fmean(acc1.values()), statistics.stdev(acc1.values())]
    return {"seconds": seconds, "acc1": spread, "all": row}


def summarise(args):
    """The rows of `taus` of all ways, and of the baseline what searches pick, and the scores."""
    rows = {}
    for name in names(args):
        for seed in range(args.seeds):
            baseline = None if name == "baseline" else read_scores(args, "baseline", seed)
            if row := taus(args, name, seed, baseline):
                rows.setdefault(label(name), {})[seed] = row
    truth = macro.load_truth()
    pair = [found for seed in range(args.seeds) if (found := read_scores(args, "baseline", seed))]
    limits = () if args.networks else macro.LIMITS  # a search may ask for any network
    return {
        "taus": study.rounded(rows),
        "picks": {
            f"{limit // 10**6}M": [macro.picks(limit, acc1, loss, truth) for loss, acc1, _ in pair] for limit in limits
        },
        "networks": sorted(pair[0][0]) if pair else [],
        "loss": [list(loss.values()) for loss, _, _ in pair],
        "acc1": [list(acc1.values()) for _, acc1, _ in pair],
    }


def label(name):
    return "two supernets, split by the first block" if name == SPLIT else name


def tables(width, results):
    """Markdown tables of one width."""
    cells = []
    for name, rows in results["taus"].items():
        for seed, row in rows.items():
            top1 = "{:.1f}, {:.1f}".format(*row["acc1"])
            gain = "{:+.2f} ({:+.2f} to {:+.2f})".format(*row["all"]["gain"]) if "gain" in row["all"] else ""
            intervals = (study.interval(row["all"][score]) for score in ("top-1", "loss"))
            cells.append((f"{width}, {name}, {seed}", top1, *intervals, gain))
    head = ("trained, seed", "top-1, sd", "tau by top-1", "by loss", "gain by loss")
    return f"{study.table(head, cells)}\n\n{macro.table_of_picks(results['picks'])}"


def parse_args(argv=None):
    defaults = {"--data-dir": ROOT / "data" / "cifar10", "--out": ROOT / "demo" / "macro_gpu", "--results": RESULTS}
    defaults |= {"--seeds": 2, "--jobs": 9, "--threads": 1, "--networks": None}
    parser = study.parser(__doc__, defaults, device="auto")
    parser.add_argument("--full", action="store_true", help="full width, 100 epochs")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="default: all; with --full, the baseline")
    parser.add_argument("--images", type=pathlib.Path, help="file of decoded images (default: OUT/images.npz)")
    parser.add_argument("--share", type=float, default=1.0, help="of each training's images (default: 1)")
    parser.add_argument("--train", action="store_true", help="only train and score")
    parser.add_argument("--job", nargs=2, metavar=("WAY", "SEED"), help="only train and score one supernet")
    args = parser.parse_args(argv)
    args.images = args.images or args.out / "images.npz"
    return args


def main(args):
    if args.job:
        work(args, args.job[0], int(args.job[1]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    decoded(args.data_dir, args.images)
    trained = args.ways or (["baseline"] if args.full else WAYS)
    side_by_side(args, [(name, seed) for seed in range(args.seeds) for name in trained])
    if args.train:
        return
    width = "full" if args.full else "half"
    results = study.read(args.results) | {width: summarise(args)}
    study.write(args.results, results)
    print(tables(f"{width} width", results[width]))


if __name__ == "__main__":
    utils.run_script(main, parse_args)
