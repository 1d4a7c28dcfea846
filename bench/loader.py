"""Measures the loaders on JPEG files of 500 x 375 px: `python bench/loader.py`; small: `--images 192 --rounds 1`.

    slow reads   every read sleeps 50 ms: images per second with 8 workers, and with 1
    warm cache   training batches, images per second: this project's DALI and torchvision loaders, DALI's external
                 source with its own workers, and DALI's own file reader, which gets the same crops and jitter from an
                 array
    jitter       milliseconds per image: decoding without jitter, with DALI's color_twist, and with the official jitter
                 (random order, contrast about the image's own mean) computed by torch on the decoded uint8 batch

The files are mosaics of the bundled images in colour. The rows of a table run in turns, and medians are reported.
DALI decodes on `--device`. Prints Markdown tables and adds to bench/results/loader.json.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils

# isort: split
import numpy as np
import torch
from PIL import Image

import dataloader
from dataloader import Loader, _EncodedImages
from images import bundled
from images.dataset import DataConfig, scan, training_plan

SLEEP_S = 0.05
NATIVE = "DALI's file reader"
DIFFERENT = 64  # files drawn from scratch
NAMES = ("encoded", "shape", "corner", "brightness", "contrast", "saturation", "horizontal_flip")


def draw_mosaics(folder, n, classes=1):
    """`n` different JPEG files of 500 x 375 px and about 100 kB as a tree, each colour channel of other images.

    What takes long is drawn for the first 64; the others are these, moved down by some rows.
    """
    rng = np.random.default_rng(0)
    files = sorted((bundled.unpack(ROOT / "data" / "fashion-mnist") / "train").glob("*/*"))
    drawn = []
    for _ in range(min(n, DIFFERENT)):
        pixels = np.empty((378, 504, 3), np.uint8)
        for channel in range(3):
            tiles = [np.asarray(Image.open(f).convert("L").resize((63, 63))) for f in rng.choice(files, 48)]
            pixels[:, :, channel] = np.array(tiles).reshape(6, 8, 63, 63).swapaxes(1, 2).reshape(378, 504)
        drawn.append(np.clip(pixels[:375, :500] + rng.normal(0, 8, (375, 500, 1)), 0, 255).astype(np.uint8))
    for c in range(classes):
        (folder / f"c{c}").mkdir(parents=True)

    def save(i):
        moved = np.roll(drawn[i % len(drawn)], i // len(drawn), axis=0)
        Image.fromarray(moved).save(folder / f"c{i % classes}" / f"{i:06}.jpg", quality=92)

    with concurrent.futures.ThreadPoolExecutor(utils.cores()) as pool:  # Pillow releases the GIL
        list(pool.map(save, range(n)))
    return scan(folder)


def rate(batches, device, skipped=1):
    """Images per second of an iterable of (images, ...), without the first batches, which may be made ahead."""
    batches = iter(batches)
    n = 0
    for _ in range(skipped):
        next(batches)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for images, *_ in batches:
        n += len(images)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return n / (time.perf_counter() - start)


def in_turns(rows, rounds):
    """{name: median of `rounds` calls} of functions by name, called in turns."""
    found = {name: [] for name in rows}
    for _ in range(rounds):
        for name, measure in rows.items():
            found[name].append(measure())
            print(f"{name}: {found[name][-1]:.1f}", file=sys.stderr)
    return {name: statistics.median(values) for name, values in found.items()}


# --- slow reads ----------------------------------------------------------------------------------------------


def slow_reads(images, config, options):
    """Images per second by number of workers."""

    def read_slowly(path, read=dataloader._read_file):
        time.sleep(SLEEP_S)
        return read(path)

    def measure(workers):
        loader = Loader(images, config, True, device="cpu", backend="dali", workers=workers)
        return rate(loader.decode(training_plan(len(images), 8, 0, steps=options.slow_batches)), loader.device)

    before = dataloader._read_file
    dataloader._read_file = read_slowly
    try:
        return in_turns({f"{n} workers": lambda n=n: measure(n) for n in (1, 8)}, options.rounds)
    finally:
        dataloader._read_file = before


# --- warm cache ----------------------------------------------------------------------------------------------


class Batch:
    """A batch of the plan by its number: a callback for the workers of DALI's external source."""

    def __init__(self, dataset, plan):
        self.dataset = dataset
        self.plan = plan

    def __call__(self, number):
        if number >= len(self.plan):
            raise StopIteration
        made = self.dataset._make(self.plan[number])
        others = ([np.asarray(value) for value in made[name]] for name in NAMES[1:])  # arrays, of scalars too
        return np.split(made["encoded"].numpy(), made["ends"][:-1]), *others


def dali_pipeline(images, config, plan, reader, options):
    """Batches of DALI with its own file reader ("file"), or its external source with processes ("parallel")."""
    import nvidia.dali
    from nvidia.dali import fn, pipeline_def, types

    dataset = _EncodedImages(images, config, True, 0)
    gpu = options.device.type == "cuda"
    files = [os.path.join(images.root, images.paths[i]) for i in np.concatenate(plan)[:, 1]]
    made = [dataset._make(batch) for batch in plan] if reader == "file" else None

    def operators():
        if reader == "file":
            encoded, _ = fn.readers.file(files=files, labels=[0] * len(files))
            rows = iter([tuple(batch[name] for name in NAMES[1:]) for batch in made])
            outputs = [encoded, *fn.external_source(rows, num_outputs=len(NAMES) - 1, batch=True)]
        else:
            ahead = {"parallel": True, "prefetch_queue_depth": 2 * max(1, options.workers)}
            outputs = fn.external_source(Batch(dataset, plan), num_outputs=len(NAMES), batch=True, **ahead)
        encoded, shape, corner, *jitter, flip = outputs
        decoder = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB, "axis_names": "HW"}
        if int(nvidia.dali.__version__.split(".")[0]) >= 2:
            decoder["adjust_orientation"] = False
        absolute = {"normalized_anchor": False, "normalized_shape": False}
        out = fn.decoders.image_slice(encoded, corner, shape, **absolute, **decoder)
        size = config.input_size
        out = fn.resize(out, resize_x=size, resize_y=size, antialias=True, interp_type=types.INTERP_LINEAR)
        out = fn.color_twist(out, **dict(zip(NAMES[3:6], jitter)))
        return fn.flip(out, horizontal=flip)

    pipeline = pipeline_def(operators)(
        batch_size=len(plan[0]), num_threads=max(1, options.workers), device_id=0 if gpu else None,
        prefetch_queue_depth=2, py_num_workers=max(1, options.workers), py_start_method="spawn" if gpu else "fork",
    )  # fmt: skip
    pipeline.build()
    for _ in plan:
        (output,) = pipeline.run()
        yield (output.as_tensor() if gpu else torch.from_numpy(np.array(output.as_tensor()))), None


def warm_cache(images, config, options):
    """Images per second by loader."""
    plan = list(training_plan(len(images), options.batch_size, 0, steps=len(images) // options.batch_size))

    def ours(backend):
        loader = Loader(images, config, True, device=options.device, backend=backend, workers=options.workers)
        return lambda: rate(loader.decode(plan), options.device)

    def dali(reader):
        return lambda: rate(dali_pipeline(images, config, plan, reader, options), options.device)

    rows = {"this project, DALI": ours("dali"), "this project, torchvision": ours("torchvision")}
    rows |= {"DALI's external source, parallel": dali("parallel"), NATIVE: dali("file")}
    return in_turns(rows, options.rounds)


# --- jitter --------------------------------------------------------------------------------------------------


def official_jitter(images, factors, orders):
    """torchvision's ColorJitter on a batch, uint8 RGB (N, H, W, 3); factors and orders (N, 3) of brightness (0),
    contrast (1) and saturation (2)."""
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    x = images.float()
    for turn in range(3):
        operation = orders[:, turn]
        factor = factors.gather(1, operation[:, None]).view(-1, 1, 1, 1)
        grey = (x @ luma)[..., None]
        contrast, saturation = ((operation == n).view(-1, 1, 1, 1) for n in (1, 2))
        base = saturation * grey + contrast * grey.mean((1, 2, 3), keepdim=True).round()
        x = (factor * x + (1 - factor) * base).clamp_(0, 255).floor_()
    return x.to(torch.uint8)


def jitter(images, config, options):
    """Milliseconds per image."""
    plain = DataConfig(**{**config.to_dict(), "jitter": 0.0})
    plan = list(training_plan(len(images), options.batch_size, 0, steps=len(images) // options.batch_size))

    def loaded(own):
        loader = Loader(images, own, True, device=options.device, backend="dali", workers=options.workers)
        return loader.decode(plan)

    batch = next(loaded(plain))[0]
    generator = torch.Generator().manual_seed(0)
    factors = torch.empty(len(batch), 3).uniform_(0.6, 1.4, generator=generator).to(options.device)
    orders = torch.rand(len(batch), 3, generator=generator).argsort(1).to(options.device)

    def official():
        for _ in range(3):
            start = time.perf_counter()
            official_jitter(batch, factors, orders)
            if options.device.type == "cuda":
                torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start) / len(batch)

    rows = {"decoding, no jitter": lambda: 1000 / rate(loaded(plain), options.device)}
    rows |= {"decoding and DALI's color_twist": lambda: 1000 / rate(loaded(config), options.device)}
    return in_turns(rows | {"the official jitter alone": official}, options.rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--slow-batches", type=int, default=40, help="batches of 8 images with slow reads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=min(8, utils.cores()))
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "loader.json")
    options = parser.parse_args()
    options.device = torch.device(options.device)
    config = DataConfig()
    with tempfile.TemporaryDirectory() as folder:
        images = draw_mosaics(pathlib.Path(folder) / "images", options.images)
        tables = {name: function(images, config, options) for name, function in
                  (("slow reads", slow_reads), ("warm cache", warm_cache), ("jitter", jitter))}  # fmt: skip
    slow, warm, twist = tables.values()
    print(f"{options.device}, {utils.cores()} cores, {options.workers} workers, batches of {options.batch_size}\n")
    print("| every read sleeps 50 ms | images/s | times one worker |\n|---|---|---|")
    for name, value in slow.items():
        print(f"| {name} | {value:.0f} | {value / slow['1 workers']:.1f} |")
    print("\n| files in the system's cache | images/s | share of DALI's file reader |\n|---|---|---|")
    for name, value in warm.items():
        print(f"| {name} | {value:.0f} | {value / warm[NATIVE]:.2f} |")
    print("\n| jitter | ms per image | share of decoding |\n|---|---|---|")
    for name, value in twist.items():
        print(f"| {name} | {value:.3f} | {value / twist['decoding, no jitter']:.2f} |")
    result = {**tables, "images": options.images, "batch_size": options.batch_size, "workers": options.workers}
    result |= {"cores": utils.cores(), "rounds": options.rounds, "commit": utils.commit(), "versions": utils.versions()}
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    utils.write_json(options.results, results | {str(options.device): result}, indent=1)


if __name__ == "__main__":
    main()
