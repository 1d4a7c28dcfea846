"""Evaluates one candidate like NNI v1.9, as the baseline of bench/search.py.

A process evaluates a single candidate: it decodes the JPEG files, recalibrates BN, and validates once; the network is
the published one in NCHW.

    python bench/baseline_search.py --supernet FILE --data DIR --architecture 2,1,0,... --calibration 20 --validation
    2000

DIR has train/<class>/ and val/<class>/. Imports only the plain reference network of the tests from this project.
Prints a line of JSON: top-1, peak memory, and the seconds of start (imports, network, weights, file lists), of
decoding and of computing, which alternate, because both use all threads.
"""

import time

START = time.perf_counter()

import argparse
import concurrent.futures
import json
import pathlib
import random
import sys

import torch
import torchvision.transforms as T
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
from reference_spos import Network


def files_of(folder):
    """Returns ([(path, label), ...] of all images in class folders, number of classes)."""
    classes = sorted(p for p in pathlib.Path(folder).iterdir() if p.is_dir())
    return [(path, label) for label, c in enumerate(classes) for path in sorted(c.iterdir())], len(classes)


def peak_mb():
    """The peak memory of this process in MB; NaN where Linux's /proc is missing."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("supernet", "data", "architecture"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--crop-scale", type=float, default=0.08)
    parser.add_argument("--calibration", type=int, default=200, help="batches of 128")
    parser.add_argument("--validation", type=int, default=2000, help="images, in batches of 200")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()

    train, n_classes = files_of(f"{args.data}/train")
    val, _ = files_of(f"{args.data}/val")
    path = [int(choice) for choice in args.architecture.split(",")]
    small = args.input_size <= 64
    last = -(-args.input_size // (16 if small else 32))
    model = Network(None, n_classes, stem_stride=1 if small else 2, last_size=last)
    weights = torch.load(args.supernet, map_location="cpu", weights_only=True)
    weights = weights.get("model", weights.get("state_dict", weights))
    model.load_state_dict({k.removeprefix("module."): v for k, v in weights.items()})

    size = args.input_size
    crop = T.RandomResizedCrop(size, (args.crop_scale, 1))
    jitter = T.ColorJitter(0.4, 0.4, 0.4)
    augment = T.Compose([crop, jitter, T.RandomHorizontalFlip(), T.PILToTensor()])
    centre = T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size), T.PILToTensor()])
    seconds = {"start": time.perf_counter() - START, "decode": 0.0, "compute": 0.0}

    def batches(samples, batch_size, transform, pool):
        for i in range(0, len(samples), batch_size):
            begin = time.perf_counter()
            some = samples[i : i + batch_size]
            images = list(pool.map(lambda sample: transform(Image.open(sample[0]).convert("RGB")), some))
            images = torch.stack(images).flip(1).float()  # BGR in [0, 255]
            labels = torch.tensor([label for _, label in some])
            seconds["decode"] += time.perf_counter() - begin
            begin = time.perf_counter()
            yield images, labels
            seconds["compute"] += time.perf_counter() - begin

    random.Random(0).shuffle(train)
    random.Random(0).shuffle(val)
    train = (train * -(-args.calibration * 128 // len(train)))[: args.calibration * 128]
    with torch.no_grad(), concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.zero_()
                module.running_var.fill_(1)
        model.train()
        for images, _ in batches(train, 128, augment, pool):
            model(images, path)
        model.eval()
        correct = 0
        for images, labels in batches(val[: args.validation], 200, centre, pool):
            correct += int((model(images, path).argmax(1) == labels).sum())
    n = min(args.validation, len(val))
    result = {"acc1": 100 * correct / n, "n_images": n, "peak_mb": peak_mb()}
    print(json.dumps(result | {k: round(v, 3) for k, v in seconds.items()}))


if __name__ == "__main__":
    main()
