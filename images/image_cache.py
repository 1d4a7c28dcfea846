"""The images that every candidate meets: calibration and validation batches, decoded once on a machine.

Decoded, augmented images are kept as one file a set below `--cache`, uint8 RGB, memory-mapped by all processes that evaluate. A
file's name and first block say what is in it: anything else than what is asked for, or a file that isn't whole, is made anew.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import time

import numpy as np
import torch

import distributed
from dataloader import Loader
from images.dataset import calibration_plan, evaluation_plan
from utils import atomic_write, log, try_lock

VERSION = 1
HEADER_BYTES = 4096


class FixedBatches:
    """The batches of a plan, the same at every iteration: (images (N, 3, H, W) float, labels (N,) int64) on the loader's device.

    Decoded once into a file below the folder `cache`; where that can't be written, or is None, anew at every iteration.
    `sharded`, every process iterates over other ones of the batches.
    """

    def __init__(self, loader, plan, cache=None, sharded=False):
        self.loader, self.plan, self.cache = loader, plan, cache
        self.first, self.every = (distributed.rank(), distributed.world_size()) if sharded else (0, 1)

    def __len__(self):
        return len(self.plan)

    def __iter__(self):
        if self._decoded is None:
            yield from self.loader.batches(self.plan[self.first :: self.every])
            return
        first = 0
        for number, samples in enumerate(self.plan):
            if number % self.every != self.first:
                first += len(samples)
                continue
            images = self._decoded[first : first + len(samples)]
            if not isinstance(images, torch.Tensor):
                images = torch.from_numpy(np.array(images))
                images = images.pin_memory() if self.loader.device.type == "cuda" else images
            labels = torch.from_numpy(self.loader.images.labels[samples[:, 1]])
            yield self.loader.finish(images), labels.to(self.loader.device, non_blocking=True)
            first += len(samples)

    @functools.cached_property
    def _decoded(self):
        """The decoded images (N, H, W, 3): on the GPU where they fit into half of what is free there, else memory-mapped."""
        images = None if self.cache is None else open_images(self.loader, self.plan, pathlib.Path(self.cache))
        on_gpu = images is not None and self.loader.device.type == "cuda"
        if on_gpu and images.nbytes < torch.cuda.mem_get_info(self.loader.device)[0] / 2:
            return torch.from_numpy(np.ascontiguousarray(images)).to(self.loader.device)
        return images


def calibration_batches(images, config, args, device):
    """The training images that recalibrate BN: stratified by class, augmented, the same for every candidate."""
    plan = calibration_plan(images.labels, args.bn_batches, args.bn_batch_size, args.seed)
    return FixedBatches(Loader.from_args(images, config, True, args, device), plan, args.cache)


def validation_batches(images, config, args, device):
    """Every image once, in the validation transform; each process has its share."""
    plan = evaluation_plan(len(images), args.eval_batch_size)
    return FixedBatches(Loader.from_args(images, config, False, args, device), plan, args.cache, sharded=True)


# --- the file ------------------------------------------------------------------------------------------------


def open_images(loader, plan, folder):
    """The decoded images of a plan, a read-only array (N, H, W, 3) mapped from a file in `folder`, which is made where it is
    missing, stale or damaged. None, with a warning, where it can't be written."""
    header = _header(loader, plan)
    shape = (sum(map(len, plan)), loader.config.input_size, loader.config.input_size, 3)
    path = folder / f"{hashlib.sha256(header).hexdigest()[:20]}.images"
    try:
        if not _is_whole(path, header, shape):
            with _lock(path):
                if not _is_whole(path, header, shape):  # another process may have made it meanwhile
                    _decode(path, loader, plan, header, shape)
        return np.memmap(path, np.uint8, "r", HEADER_BYTES, shape)
    except OSError as error:
        log.warning(
            "--cache %s: can't keep decoded images there (%s); decoding them anew each time",
            folder,
            error.strerror or error,
        )
        return None


def _header(loader, plan):
    """The file's first block: what decides about its content, as JSON, and a checksum of that."""
    files = hashlib.sha256()
    for index in np.unique(np.concatenate(plan)[:, 1]):
        path = loader.images.paths[index]
        state = os.stat(os.path.join(loader.images.root, path)) if loader.images.root else None
        files.update(
            f"{index} {path} {state and (state.st_size, state.st_mtime_ns)}\n".encode(errors="surrogateescape")
        )
    content = {
        "version": VERSION, "files": files.hexdigest(), "plan": hashlib.sha256(np.concatenate(plan).tobytes()).hexdigest(),
        "config": loader.config.to_dict(), "augment": loader.augment, "seed": loader.seed, "decoder": loader.decoder,
    }  # fmt: skip
    text = json.dumps(content, sort_keys=True)
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n".encode().ljust(HEADER_BYTES)


def _is_whole(path, header, shape):
    """Whether there is a file of this header and length."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read(HEADER_BYTES) == header and os.fstat(file.fileno()).st_size == HEADER_BYTES + np.prod(shape)
    return False


def _decode(path, loader, plan, header, shape):
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed while it wrote
        left.unlink()
    log.info("decoding %d images into %s, %.1f GB, once", shape[0], path, np.prod(shape) / 1e9)
    with atomic_write(path, "wb") as file:
        file.write(header)
        for images, _ in loader.decode(plan):
            file.write(images.cpu().numpy().tobytes())


@contextlib.contextmanager
def _lock(path):
    """Holds the lock of a file; waits while another process does."""
    waiting = False
    while not (file := try_lock(path.with_suffix(".lock"))):
        if not waiting:
            log.info("%s: another process is decoding these images; waiting for it", path)
        waiting = True
        time.sleep(0.2)
    with file:
        yield
