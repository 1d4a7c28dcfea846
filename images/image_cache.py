"""Caches the images that all candidates share: calibration and validation batches, decoded once on a machine.

A set of decoded (and augmented) images is one file in `--cache`, uint8 RGB, memory-mapped by all processes that
evaluate. Its name is a hash of all that its pixels depend on; there is nothing else in it, and a file of the wrong
length is written again. No .npy file: NumPy raises anything for a damaged header, and writing through its map ends the
process where the disk is full.
"""

import functools
import hashlib
import json
import math
import os
import pathlib

import numpy as np
import torch

from utils import UserError, atomic_write, heartbeat, log, wait_for_lock

CACHE_VERSION = 2  # files of another version have other names, and may be deleted


class FixedBatches:
    """The same batches at every iteration: images (N, 3, H, W) float, labels (N,) int64, on the device of the loader.

    Decodes the plan once, into a file in the folder `cache`, or at every iteration if `cache` is None or can't be
    written. Of several ranks, each iterates over its own share of the batches. Between iterations nothing is held, and
    within one a batch at a time: the file is mapped, and its pages are the system's.
    """

    def __init__(self, loader, plan, cache=None, rank=0, world_size=1):
        if cache and not hasattr(loader, "decode"):
            raise UserError("cache: images given in Python have no files, and are not cached; leave it out")
        self.loader = loader
        self.plan = plan
        self.cache = cache
        self.rank = rank
        self.world_size = world_size

    def __len__(self):
        return len(self.plan)

    @property
    def second_halves(self):
        """For each batch of an iteration, which of its images are in the second half (N,); None where none is told."""
        halves = getattr(self.loader.images, "halves", None)
        own = self.plan[self.rank :: self.world_size]
        return [None if halves is None else torch.from_numpy(halves[samples[:, 1]] == 1) for samples in own]

    @property
    def groups(self):
        """(sizes of the groups of all images (G,), for each batch of an iteration the groups of its images (N,)), or
        None where images have no groups."""
        groups = getattr(self.loader.images, "groups", None)
        if groups is None:
            return None
        _, groups = np.unique(groups, return_inverse=True)
        own = self.plan[self.rank :: self.world_size]
        return torch.from_numpy(np.bincount(groups)), [torch.from_numpy(groups[samples[:, 1]]) for samples in own]

    def prepare(self):
        """Decodes the images into the folder `cache`, unless they are there."""
        self._mapped()

    def __iter__(self):
        decoded = self._mapped()
        if decoded is None:
            yield from self.loader.batches(self.plan[self.rank :: self.world_size])
            return
        ends = np.cumsum([len(samples) for samples in self.plan])
        for samples, end in list(zip(self.plan, ends))[self.rank :: self.world_size]:
            images = torch.from_numpy(np.array(decoded[end - len(samples) : end]))
            if self.loader.device.type == "cuda":
                images = images.pin_memory()
            labels = torch.from_numpy(self.loader.images.labels[samples[:, 1]])
            yield self.loader.finish(images), labels.to(self.loader.device, non_blocking=True)

    def _mapped(self):
        """The decoded images, a read-only array (N, H, W, 3) mapped from their file; None without one.

        Writes the file if it is missing or incomplete; from the first failure on, with a warning, there is none.
        """
        if self.cache is None:
            return None
        path = pathlib.Path(self.cache) / f"{self._name}.images"
        shape = (sum(map(len, self.plan)), self.loader.config.input_size, self.loader.config.input_size, 3)

        def write(file):
            log.info("decoding %d images into %s, %.1f GB, once", shape[0], path, math.prod(shape) / 1e9)
            for images, _ in self.loader.decode(self.plan):
                file.write(images.cpu().numpy().tobytes())

        try:
            written_once(path, lambda: path.exists() and path.stat().st_size == math.prod(shape), write)
            return np.memmap(path, np.uint8, "r", shape=shape)
        except OSError as error:
            text = "--cache %s: can't cache decoded images there (%s); decoding them every time"
            log.warning(text, self.cache, error.strerror or error)
            self.cache = None
            return None

    @functools.cached_property
    def _name(self):
        """A hash of all that the pixels depend on."""
        loader = self.loader
        content = {
            "version": CACHE_VERSION,
            "files": files_hash(loader.images, np.unique(np.concatenate(self.plan)[:, 1])),
            "plan": hashlib.sha256(np.concatenate(self.plan).tobytes()).hexdigest(),
            "config": loader.config.to_dict(),
            "augment": loader.augment,
            "seed": loader.seed,
            "decoder": loader.decoder,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def files_hash(images, indices):
    """A hash of names, sizes and times of the files of an ImageSet."""
    files = hashlib.sha256()
    for index in indices:
        heartbeat()  # a file server may take long
        path = images.paths[index]
        state = os.stat(os.path.join(images.root, path)) if images.root else None
        text = f"{index} {path} {state and (state.st_size, state.st_mtime_ns)}\n"
        files.update(text.encode(errors="surrogateescape"))
    return files.hexdigest()


def written_once(path, is_complete, write):
    """Has one process on a machine `write` a file, whole or not at all, unless `is_complete()`; others wait for it."""
    if is_complete():
        return
    waits = f"{path}: another process is decoding these images; waiting for it"
    with wait_for_lock([path.with_suffix(".lock")], waits)[1]:
        if is_complete():  # another process has written it meanwhile
            return
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # from a process that was killed while writing
            leftover.unlink()
        with atomic_write(path, "wb") as file:
            write(file)
