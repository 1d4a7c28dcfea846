"""Measures one GPU in parts, that of which least is known first: `python -m bench.gpu`; small without a GPU.

    ways         steps in bfloat16 of 128 and 1,024 images: as they are, in micro-batches, compiled, with CUDA graphs of
                 operations; calibration with those too; the last lines say what to adopt
    candidates   seconds of a candidate of 75,600 random images: one by one and as a tree, BN folded or not, bfloat16,
                 validation batches of 200 and 1,000; and which share of them is calibration
    files        supernet.py itself on drawn JPEG files of 500 x 375 px: images per second, the share of time waited
                 after its first 50 steps; then the loaders alone, and supernet.py compiled with micro-batches
    commands     seconds of the four commands with the demo's images and few steps, with NNI where it is installed
    processes    a group of one process: supernet.py by torchrun, and every collective of distributed.py on the GPU
    training     images per second and peak memory of random paths: the official way; float32 and bfloat16
    profile      a step of one path by kinds of operations, the kernels that take longest, and lower bounds

A part is a process of its own and has its share of what is left of `--seconds`. Every result is written to
bench/results/gpu.json as soon as it exists. What fails is reported, and the next row or part runs. Needs no network,
and neither NNI nor DALI: what needs them is left out. Prints Markdown tables, and the lines of docs/scaling.md that
follow.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

import numpy as np
import torch
from PIL import Image

import utils
from bench import study
from bench.steps import Variant, Way, floors_ms, random_batch, rates
from bench.steps import profile as profile_of
from bench.study import ROOT, memory_mb, seconds
from dataloader import Loader
from images import bundled
from images.dataset import DataConfig, scan, training_plan
from images.workers import AHEAD
from network import ShuffleNetV2OneShot
from space.evolution import Evolution
from space.sampler import PathSampler, default_flops_range
from space.search_space import SearchSpace
from training import compiled, distributed
from training.evaluation import evaluate, resolve_device
from training.loop import LOG_EVERY

START = time.monotonic() - time.process_time()  # about when this process began: imports take seconds, which count
CALIBRATION, VALIDATION = 25_600, 50_000  # images of a candidate, calibration in batches of 128
OFFICIAL_IMAGES = CALIBRATION + VALIDATION
SUPERNET_IMAGES, RETRAIN_IMAGES = 150_000 * 1024, 300_000 * 1024 + 1250 * 1024
BYTES_BF16 = 3 * 2 * 2 * 4.32e6  # an image: three passes that read and write the convolutions' outputs
ONE_PATH, COPY = "a step of architecture_final.json, channels-last, ms by images", "copy, GB/s"  # measured by hand
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
MODULE = ["-m", "bench.gpu"]
TRAINING = {  # name -> (settings of a Variant, cuDNN's benchmark, images)
    "bf16, channels-last, 1,024 images": ({"amp": "bf16"}, False, 1024),
    "float32, channels-last, 1,024 images": ({}, False, 1024),
    "bf16, channels-last, 128 images": ({"amp": "bf16"}, False, 128),
    "float32, channels-last, 128 images": ({}, False, 128),
    "bf16, channels-last": ({"amp": "bf16"}, False, 256),
    "float32, channels-last": ({}, False, 256),
    "official way, float32": ({"official": True}, True, 256),
}
CANDIDATES = {  # name -> (one by one, settings of evaluate)
    "tree, BN folded": (False, {}),
    "tree, BN folded, bf16": (False, {"amp": "bf16"}),
    "one by one, BN folded": (True, {}),
    "tree, not folded": (False, {"fold": False}),
}


def installed(package):
    return bool(importlib.util.find_spec(package.split(".")[0]) and importlib.util.find_spec(package))


def command(words, seconds, log=None):
    """Runs `python WORDS` in a process group of its own, and returns its seconds; `log` is a file for its output.

    Raises RuntimeError with the end of the log where it fails. What is left of the group is ended, whatever comes.
    """
    words, start = [sys.executable, *map(str, words)], time.monotonic()
    with open(log, "w") if log else contextlib.nullcontext() as out:
        process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        try:
            code = process.wait(max(1, seconds))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10 if log else 20)  # a part ends its own commands first
                os.killpg(process.pid, signal.SIGKILL)
    if code:
        end = log.read_text().strip()[-1000:] if log else ""
        raise RuntimeError(f"exit code {code}: {' '.join(words[1:])}\n{end}")
    return time.monotonic() - start


# --- parts: functions of the options and a folder that return {row: function that measures it} ----------------

EAGER, COMPILED, GRAPHS = "eager", "compiled", "CUDA graphs of operations"
WAYS = {  # name -> (images, settings of a Training, whether operations become CUDA graphs); compiling takes minutes
    f"128 images, {EAGER}": (128, {}, False),
    f"128 images, {GRAPHS}": (128, {}, True),
    f"1,024 images, {EAGER}": (1024, {}, False),
    f"1,024 images in micro-batches of 128, {EAGER}": (1024, {"micro_batch": 128}, False),
    f"1,024 images in micro-batches of 128, {GRAPHS}": (1024, {"micro_batch": 128}, True),
    f"128 images, {COMPILED}": (128, {"compile": True}, False),
    f"1,024 images in micro-batches of 128, {COMPILED}": (1024, {"micro_batch": 128, "compile": True}, False),
    f"1,024 images, {COMPILED}": (1024, {"compile": True}, False),
}
TARGETS = {"128": 6000, "1,024": 10_000}  # images -> images per second


def ways(options, _):
    """A row: {"images", "images_per_second", "peak_mb", "seconds_of_first_use"} of steps on random paths, in bf16."""
    device, space = options.device, options.space
    sampler = PathSampler(space, 0, default_flops_range(space))
    on_gpu = device.type == "cuda"
    if options.large:
        compiled.prepare_compiler(device, ROOT / "data" / "cache")
    else:
        compiled.BACKEND = "eager"

    def size(n):
        return n if options.large else max(2, n // 64)

    def row(n, changes, graphs):
        changes = {**changes, "micro_batch": size(changes["micro_batch"])} if "micro_batch" in changes else changes
        way = Way(space, device, size(n), amp="bf16", **changes)
        start = time.perf_counter()
        if graphs:
            way.graph_operations()
        way.warm_up()
        first = time.perf_counter() - start
        rate = way.n * options.steps / sum(way.step(sampler.candidate(step)) for step in range(1, options.steps + 1))
        peak = way.peak_mb(sampler.candidate(1))
        return {"images": way.n, "images_per_second": rate, "peak_mb": peak, "seconds_of_first_use": first}

    def calibration(graphs):
        way = Way(space, device, size(128), amp="bf16")
        took = way.calibration(sampler.candidate(1), options.batches, graphs)
        return {"images": way.n, "images_per_second": way.n * options.batches / took}

    rows = {f"calibration of 128 images, {EAGER}": functools.partial(calibration, False)}
    if on_gpu:
        rows |= {f"calibration of 128 images, {GRAPHS}": functools.partial(calibration, True)}
    else:
        print(f"ways: {GRAPHS} need a GPU and are left out", file=sys.stderr)
    return rows | {n: functools.partial(row, *settings) for n, settings in WAYS.items() if on_gpu or not settings[2]}


def adoption(rows):
    """Lines that say which way is the fastest, of the rows of `ways`: at each size, and in calibration."""
    lines = []
    for title in ("128 images", "1,024 images", "calibration of 128 images"):
        found = {name: row["images_per_second"] for name, row in rows.items() if name.startswith(title)}
        if not (eager := found.get(f"{title}, {EAGER}")) or len(found) < 2:
            continue
        best = max(found, key=found.get)
        target = TARGETS.get(title.partition(" ")[0])
        reached = f"; target {target:,}: {'reached' if found[best] >= target else 'missed'}" if target else ""
        advice = f"adopt {best}" if found[best] > 1.1 * eager else f"keep {title}, {EAGER}"
        lines.append(f"{advice}: {found[best]:,.0f} images/s, {found[best] / eager:.2f} times eager{reached}")
    return lines


def generation(space, population):
    """The tenth population of an evolution on random additive rewards; 59% of all candidates meet the FLOPs limit."""
    rng = random.Random(0)
    table = [[rng.gauss(0, 1) for _ in space.operations] for _ in range(space.n_blocks)]
    half = population // 2
    settings = {"population": population, "select": max(2, population // 5), "mutation": half, "crossover": half}
    settings |= {"mutation_prob": 0.1, "generations": 10, "seed": 0, "flops_limit": space.cost_value("flops", "59%")}
    evolution = Evolution.from_settings(space, settings)
    for _ in range(9):
        evolution.tell({c: sum(row[choice] for row, choice in zip(table, c)) for c in evolution.ask()})
    return evolution.ask()


def candidates(options, _):
    """A row: {"seconds" of a candidate of OFFICIAL_IMAGES, "calibration_percent" of them}."""
    device, space = options.device, options.space
    population = generation(space, options.population)
    supernet = ShuffleNetV2OneShot(space=space).to(device, memory_format=torch.channels_last)

    class Batches:
        """The same random batch n times; the time at which they are first asked for is noted."""

        def __init__(self, n, images):
            self.n, self.n_images = n, n * images
            images, labels = random_batch(space, images, device)
            self.batch = images.to(memory_format=torch.channels_last), labels

        def __iter__(self):
            study.synchronize(device)
            self.asked = time.perf_counter()
            return iter([self.batch] * self.n)

    def row(alone, how, images):
        calibration = Batches(options.batches, 128 if options.large else 8)
        validation = Batches(max(1, options.batches * 200 // images), images if options.large else 8)
        evaluate(supernet, population, [*calibration][:1], [*validation][:1], **how)  # the first use of every operation
        took = [0.0, 0.0]  # calibration and validation, in seconds
        for part in [[c] for c in population] if alone else [population]:
            evaluate(supernet, part, calibration, validation, **how)
            took[0] += validation.asked - calibration.asked
            took[1] += time.perf_counter() - validation.asked
        took[0] *= CALIBRATION / calibration.n_images / len(population)
        took[1] *= VALIDATION / validation.n_images / len(population)
        return {"seconds": sum(took), "calibration_percent": 100 * took[0] / sum(took)}

    return {
        f"{name}, validation batches of {n:,}": functools.partial(row, *settings, n)
        for n in (200, 1000)
        for name, settings in CANDIDATES.items()
    }


def draw_mosaics(folder, n, classes):
    """`n` different JPEG files of 500 x 375 px and about 100 kB as a tree, each colour channel of other images.

    What takes long is drawn for the first 64; the others are these, moved down by some rows.
    """
    rng = np.random.default_rng(0)
    paths = sorted((bundled.unpack(ROOT / "data" / "fashion-mnist") / "train").glob("*/*"))
    drawn = []
    for _ in range(min(n, 64)):
        pixels = np.empty((378, 504, 3), np.uint8)
        for channel in range(3):
            tiles = [np.asarray(Image.open(f).convert("L").resize((63, 63))) for f in rng.choice(paths, 48)]
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


def files(options, folder):
    """A row: {"images_per_second", "wait_percent" of supernet.py}."""
    out, size = folder / "images", ("--input-size", options.space.input_size)
    images = draw_mosaics(out / "train", options.files, classes=8)
    draw_mosaics(out / "val", 8, classes=8)
    batch_size, steps, workers = (512, 3 * LOG_EVERY, max(2, utils.cores() - 2)) if options.large else (8, 4, 1)

    def supernet(backend, name, *more):
        words = ["--data-dir", out, "--out", folder / name, "--cache", folder / "cache", "--device", options.device]
        words += ["--loader", backend, "--amp", "bf16", "--batch-size", batch_size, "--workers", workers, *size, *more]
        words += ["--iterations", steps, "--val-every", steps, "--save-every", steps, "--val-paths", 1]
        words += ["--bn-batches", 2, "--bn-batch-size", 8, "--heldout-per-class", 2]
        with contextlib.suppress(subprocess.TimeoutExpired):  # the lines that there are will do
            command([ROOT / "supernet.py", *words], options.left(), log=folder / f"{name}.log")
        lines = (folder / name / "checkpoints" / "supernet" / "log.jsonl").read_text().splitlines()
        later = [json.loads(line) for line in lines][1 if options.large else 0 :]
        return {
            "images_per_second": statistics.harmonic_mean(line["train/images_per_second"] for line in later),
            "wait_percent": statistics.fmean(line["train/wait_percent"] for line in later),
            "lines": len(later),  # in the log, every 50 steps
            "workers": workers,
        }  # fmt: skip

    def alone(backend):
        skipped = AHEAD * workers  # made ahead while the first one is waited for
        how = {"device": options.device, "backend": backend, "workers": workers}
        loader = Loader(images, DataConfig(input_size=options.space.input_size), True, **how)
        plan = training_plan(len(images), batch_size, 0, steps=skipped + (60 if options.large else 2))
        batches = loader.batches(plan)
        for _ in range(skipped):
            next(batches)
        n = []
        took = seconds(options.device, lambda: n.extend(len(x) for x, _ in batches))
        return {"images_per_second": sum(n) / took}

    backends = [b for b in ("dali", "torchvision") if b == "torchvision" or installed("nvidia.dali")]
    rows = {f"supernet.py, {b}": functools.partial(supernet, b, b) for b in backends}
    rows |= {f"{b} alone": functools.partial(alone, b) for b in backends}
    if options.device.type == "cuda":
        how = ("--batch-size", 1024, "--micro-batch", 128, "--compile")
        title = f"supernet.py, {backends[0]}, 1,024 images in micro-batches of 128, {COMPILED}"
        rows[title] = functools.partial(supernet, backends[0], COMPILED, *how)
    return rows


def commands(options, folder):
    """A row: {"seconds"}."""
    out, nni = folder / "local", folder / "nni"
    few, bn = ["--heldout-per-class", 10, "--device", options.device], ["--bn-batches", 2]
    steps = 2 * LOG_EVERY if options.large else 8
    train = [*few, "--iterations", steps, "--warmup", 2, "--val-every", steps, "--batch-size", 64]
    search = [*few, *bn, "--population", 4, "--select", 2, "--mutation", 1, "--crossover", 1, "--generations", 2]

    def row(script, words, to=out):
        common = ["--demo", "--out", to, "--cache", folder / "cache"]
        log = folder / f"{to.name}-{script}.log"
        return {"seconds": command([ROOT / script, *common, *words], options.left(), log=log)}

    def search_with_nni():
        shutil.copytree(out / "checkpoints" / "supernet", nni / "checkpoints" / "supernet")
        shutil.copy(out / "nni_auto_gen_search_space.json", nni)
        return row("search.py", search, nni)

    best = ["--architecture", out / "checkpoints" / "best.json", "--bn-pass", 2]
    rows = {
        "supernet.py": lambda: row("supernet.py", [*train, *bn, "--val-paths", 1]),
        "tester.py": lambda: row("tester.py", ["--mode", "gen"]),
        "search.py, local": lambda: row("search.py", [*search, "--engine", "local"]),
        "scratch.py": lambda: row("scratch.py", [*train, *best]),
    }
    return rows | ({"search.py, NNI": search_with_nni} if installed("nni") else {})


def processes(options, folder):
    """A row: {"seconds"}, or what `collectives` returns."""
    log, steps = folder / "log", 2 * LOG_EVERY if options.large else 4
    words = ["--demo", "--out", folder, "--device", options.device, "--iterations", steps, "--warmup", 2]
    words += ["--val-every", steps, "--val-paths", 1, "--bn-batches", 2]

    def collectives_row():
        command([*TORCHRUN, *MODULE, "--collectives", "--device", options.device], options.left(), log=log)
        return json.loads(next(line for line in log.read_text().splitlines() if line.startswith("{")))

    return {
        "collectives": collectives_row,
        "supernet.py": lambda: {"seconds": command([*TORCHRUN, ROOT / "supernet.py", *words], options.left(), log=log)},
    }


class MoreThanOne(int):
    """A number of processes, 1, that is more than one: functions of a group then call their collectives."""

    def __gt__(self, other):
        return True

    def __eq__(self, other):
        return False

    __hash__ = int.__hash__


def collectives(device):
    """{function of distributed.py: milliseconds of its second call} in a group of one, where it changes nothing."""
    distributed.join(device.type)
    distributed.world_size = lambda: MoreThanOne(1)
    values = torch.arange(8.0, device=device)
    parameter = torch.nn.Parameter(torch.zeros_like(values))
    parameter.grad = values.clone()
    calls = {  # name -> a call that must return values equal to those given
        "broadcast_from_rank0": lambda x: [distributed.broadcast_from_rank0([x]), x][1],
        "average_gradients": lambda x: [distributed.average_gradients([parameter]), parameter.grad][1],
        "all_reduce_mean": lambda x: [distributed.all_reduce_mean([x], 3), x][1],
        "all_reduce_sum": lambda x: distributed.all_reduce_sum(x.cpu()).to(device),
        "all_reduce_max": lambda x: x * distributed.all_reduce_max(1),
        "mean": lambda x: x * distributed.mean(torch.ones(1)),
        "on_rank0": lambda x: torch.tensor(distributed.on_rank0(x.tolist), device=device),
        "check_same": lambda x: [distributed.check_same({"--seed": 1}), x][1],
    }
    rows = {}
    for name, call in calls.items():
        for _ in range(2):  # the first call of a backend starts it
            given, start = values.clone(), time.perf_counter()
            result = call(given)
            study.synchronize(device)
            rows[name] = 1000 * (time.perf_counter() - start)
        if not torch.equal(result, values):
            raise RuntimeError(f"{name} in a group of one changes {values.tolist()} to {result.tolist()}")
    return {"backend": str(torch.distributed.get_backend_config()), **rows}


def training(options, _):
    """A row: {"images", "images_per_second", "peak_mb", "mb_per_image"} of steps on random paths and images."""
    device, space = options.device, options.space
    sampler = PathSampler(space, 0, default_flops_range(space))

    def row(changes, benchmark, n):
        torch.backends.cudnn.benchmark = benchmark
        variant = Variant(space, device, **changes)
        images, labels = random_batch(space, n if options.large else n // 64, device)

        def steps(paths):
            for path in paths:
                variant.step(images, labels, path)

        # The plans of cuDNN are the process's: rows of equal shapes share them.
        first = seconds(device, lambda: steps(map(space.uniform_candidate, range(len(space.operations)))))
        at_rest = (torch.cuda.memory_allocated() - images.nbytes) / 1e6 if device.type == "cuda" else 0.0
        memory_mb(device, reset=True)
        took = seconds(device, lambda: steps(map(sampler.candidate, range(options.steps))))
        n, peak = len(images), memory_mb(device)
        return {
            "images": n, "images_per_second": n * options.steps / took, "peak_mb": peak,
            "mb_per_image": (peak - at_rest) / n, "seconds_of_first_use": first,
        }  # fmt: skip

    return {name: functools.partial(row, *settings) for name, settings in TRAINING.items()}


def profile(options, _):
    """A row: {"ms": {kind: ms}, "floors_ms": {kind: [of multiply-adds, of traffic]}, "kernels": {name: ms}}."""
    device, space = options.device, options.space
    path = space.load_architecture(ROOT / "architecture_final.json")
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16}

    @functools.cache
    def measured(name):
        torch.backends.cuda.matmul.allow_tf32 = True  # as in convolutions
        return rates(device, dtypes[name])

    def rates_row():
        found = {f"{name}, multiply-adds/s": measured(name)[0] for name in dtypes}
        return found | {"copy, bytes/s": measured("float32")[1]}

    def row(name, n):
        amp = "bf16" if name == "bf16" else "off"
        variant = Variant(space, device, amp=amp)
        n = n if options.large else n // 64
        kinds, kernels = profile_of(variant, (*random_batch(space, n, device), path))
        floors = floors_ms(space, path, n, *measured(name), dtypes[name].itemsize)
        return {"ms": kinds, "floors_ms": floors, "kernels": kernels}

    rows = {"rates": rates_row}
    for name, n in (("float32", 1024), ("float32", 256), ("bf16", 1024), ("bf16", 256)):
        rows[f"{name}, {n:,} images"] = functools.partial(row, name, n)
    return rows


# --- all of them ----------------------------------------------------------------------------------------------

# name -> (function, seconds that it takes on a GPU, about)
PARTS = {
    "ways": (ways, 180),
    "candidates": (candidates, 60),
    "files": (files, 150),
    "commands": (commands, 60),
    "processes": (processes, 40),
    "training": (training, 50),
    "profile": (profile, 30),
}


def measure(part, options):
    """Measures a part row by row, and writes each; returns the names of the rows that failed."""
    rows, failed = {}, []
    about = {"date": datetime.date.today().isoformat(), "commit": utils.commit(), "cores": utils.cores()}
    about["input_size"] = options.space.input_size
    with tempfile.TemporaryDirectory() as folder:
        for name, row in PARTS[part][0](options, pathlib.Path(folder)).items():
            if options.left() <= 0:
                print(f"{part}, {name}: no time left", file=sys.stderr)
                continue
            try:
                rows[name] = row()
            except Exception as error:
                failed.append(name)
                traceback.print_exc()
                print(f"{part}, {name}: failed: {error}", file=sys.stderr)
                continue
            print(f"{part}, {name}: {rows[name]}", file=sys.stderr)
            results = study.read(options.results)
            results.setdefault(options.card, {})[part] = {"rows": rows, **about, "versions": utils.versions()}
            utils.write_json(options.results, results, indent=1)
    show(part, rows)
    if part == "ways" and options.device.type == "cuda":
        print("", *adoption(rows), sep="\n")
    return failed


def measure_each(parts, options, run=command):
    """Measures parts in processes of their own, each in its share of the time left; returns those that failed."""
    failed = []
    for number, part in enumerate(parts):
        share = options.left() * PARTS[part][1] / sum(PARTS[other][1] for other in parts[number:])
        words = [*MODULE, "--only", part, "--seconds", int(share), "--device", options.device.type]
        try:
            run([*words, "--results", options.results, *["--full"] * options.full], share + 5)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"{part}: {str(error).strip()}; the next part runs", file=sys.stderr)
            failed.append(part)
    return failed


def hours(seconds):
    return f"{seconds / 3600:.1f} h"


def of_most_images(rows, name):
    """The training row of this project's step with the most images, of "float32" or "bf16"; None if there is none."""
    found = [row for title, row in rows.items() if re.fullmatch(rf"{name}, channels-last(, [\d,]+ images)?", title)]
    return max(found, key=lambda row: row["images"], default=None)


def scaling_rows(card, result):
    """The lines of docs/scaling.md that are calculated from what was measured on a card: {table: [line, ...]}."""
    training, memory, search = [], [], []
    rows = result.get("training", {}).get("rows", {})
    for name in ("float32", "bf16"):
        if not (row := of_most_images(rows, name)):
            continue
        rate, mb = row["images_per_second"], row["mb_per_image"]
        measured = f"calculated: {rate:,.0f} images/s of random paths, {row['images']:,} images per step"
        cells = f"{hours(SUPERNET_IMAGES / rate)} | {hours(RETRAIN_IMAGES / rate)} | {measured}"
        training.append(f"| one {card}, {name} | {cells} |")
        memory.append(
            f"| memory of one {card}, {name} | {mb * 1.024:.0f} GB | {mb:.1f} MB an image, measured; times 1,024 |"
        )
        if "candidates" in result:
            continue
        third = f"calculated: a forward pass takes a third of a step, at {rate:,.0f} images/s; prefix tree not included"
        search.append(f"| one {card}, {name} | {hours(1000 * OFFICIAL_IMAGES / rate / 3)} | {third} |")
    for name, times in result.get("by hand", {}).get("rows", {}).get(ONE_PATH, {}).items():
        for images, gpus, free in ((1024, "one", ""), (128, "eight", ", as if exchange were free")):
            if ms := name in ("float32", "bf16") and times.get(str(images)):
                cells = f"{hours(SUPERNET_IMAGES / 1024 * ms / 1000)} | {hours(RETRAIN_IMAGES / 1024 * ms / 1000)}"
                measured = f"calculated: {ms:g} ms a step of one path{free}"
                training.append(f"| {gpus} {card}, {name}, {images:,} images on each | {cells} | {measured} |")
    if gb := result.get("by hand", {}).get("rows", {}).get(COPY):
        rate = gb * 1e9 / BYTES_BF16
        cells = f"{hours(SUPERNET_IMAGES / rate)} | {hours(RETRAIN_IMAGES / rate)}"
        bound = f"calculated: {gb:,} GB/s of a copy, 52 MB an image; no program reaches it"
        training.append(f"| lower bound of an {card} in bf16: {round(rate, -3):,.0f} images/s | {cells} | {bound} |")
    for name, row in result.get("candidates", {}).get("rows", {}).items():
        measured = f"calculated: {row['seconds']:.1f} s a candidate"
        search.append(f"| one {card}, {name} | {hours(1000 * row['seconds'])} | {measured} |")
    return {"Training": training, "What else it takes": memory, "Search": search}


def show(part, rows):
    """Prints the rows of a part as a Markdown table."""
    flat = {
        name: {k: v for k, v in row.items() if not isinstance(v, dict)} | row.get("ms", {})
        for name, row in rows.items()
    }
    columns = list(dict.fromkeys(column for row in flat.values() for column in row))
    values = {name: [row.get(column, "") for column in columns] for name, row in flat.items()}
    cells = [[name, *(f"{v:,.1f}" if isinstance(v, float) else v for v in row)] for name, row in values.items()]
    print("", study.table((part, *columns), cells), sep="\n")


def list_of_parts(text):
    parts = text.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: not one of {', '.join(PARTS)}")
    return parts


def parse_args(argv=None):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = {"--seconds": 570, "--results": study.RESULTS / "gpu.json"}
    parser = study.parser(__doc__, defaults, devices=("cpu", "cuda"), device=device)
    parser.add_argument("--only", type=list_of_parts, default=list(PARTS), metavar="PART,PART", help="parts (all)")
    parser.add_argument("--full", action="store_true", help="the numbers of a GPU on a CPU too")
    parser.add_argument("--collectives", action="store_true", help=argparse.SUPPRESS)  # in a group, by torchrun
    return parser.parse_args(argv)


def main(options):
    if options.collectives:
        distributed.run(lambda args: print(json.dumps(collectives(torch.device(args.device)))), lambda: options)
        return
    resolve_device(options.device)
    options.device = torch.device(options.device)
    options.left = lambda: options.seconds - (time.monotonic() - START)
    options.large = options.full or options.device.type == "cuda"
    options.steps, options.population, options.batches, options.files = (
        (12, 10, 20, 4096) if options.large else (1, 2, 1, 64)
    )
    options.space = SearchSpace() if options.large else SearchSpace.for_images(32, 10)
    options.card = torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu"
    one = len(options.only) == 1
    with study.interruptible():  # so that commands are ended
        failed = measure(options.only[0], options) if one else measure_each(options.only, options)
    if not one and options.device.type == "cuda":
        for heading, lines in scaling_rows(options.card, study.read(options.results).get(options.card, {})).items():
            print(f"\ndocs/scaling.md, {heading}:", *lines, sep="\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    utils.run_script(main, parse_args)
