"""Run by test_distributed.py under torchrun: trains and evaluates on random images; each rank leaves a file in OUT."""

import pathlib
import sys

import torch
from test_training import SPACE, Images, settings

from network import ShuffleNetV2, ShuffleNetV2OneShot
from space.sampler import PathSampler
from training import distributed
from training.evaluation import accuracy, evaluate, recalibrate_bn
from training.loop import train
from training.run import TrainingRun

CANDIDATES = [(0, 1, 2, 3), (0, 1, 2, 0)]


class InDouble(Images):
    """A loader whose images are the same in whatever batch they come."""

    def batches(self, plan):
        shape = (len(self.images), 3, self.px, self.px)
        images = torch.rand(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 255
        return ((images[batch[:, 1]], torch.from_numpy(batch[:, 1] % 3)) for batch in plan)


def random_batches(n, size):
    generator = torch.Generator().manual_seed(1)
    sizes = [size - i % 2 for i in range(n)]
    return [
        (torch.rand(s, 3, 16, 16, generator=generator) * 255, torch.randint(3, (s,), generator=generator))
        for s in sizes
    ]


def measured(rank=0, world=1):
    """Accuracies of candidates and of a network, and that network's BN statistics as the average over 5 batches."""
    torch.manual_seed(0)
    supernet, network = ShuffleNetV2OneShot(space=SPACE), ShuffleNetV2(CANDIDATES[0], space=SPACE)
    calibration, validation = random_batches(5, 16), random_batches(3, 20)
    results = evaluate(supernet, CANDIDATES, calibration, validation[rank::world])
    recalibrate_bn(network, network, calibration[rank::world], "average", sharded=world > 1)
    buffers = {name: b.clone() for name, b in network.named_buffers() if "running" in name}
    return [r | {"seconds": 0} for r in results], accuracy(network, validation[rank::world]), buffers


def trained(folder, dtype, steps, **changes):
    torch.manual_seed(0)
    model = ShuffleNetV2OneShot(space=SPACE).to(dtype)
    sampler = PathSampler(SPACE, 0)
    stored = {"space": SPACE.to_dict(), "data": {}, "split": None, "classes": ["a", "b", "c"]}
    folder.mkdir(parents=True, exist_ok=True)
    images, run = InDouble() if dtype == torch.float64 else Images(), TrainingRun(folder, "supernet", stored)
    metrics = train(model, images, settings(iterations=steps, **changes), sampler.candidate, lambda step: {}, run)
    return {
        "weights": dict(model.named_parameters()),
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
        "loss": metrics["train/loss"],
    }


def main(out):
    distributed.join("cpu")
    rank = distributed.rank()
    result = {
        str(dtype): trained(out / str(dtype), dtype, steps) for dtype, steps in ((torch.float32, 1), (torch.float64, 3))
    }
    result["micro-batches"] = trained(out / "micro-batches", torch.float64, 3, micro_batch=2)
    torch.save(result | {"measured": measured(rank, distributed.world_size())}, out / f"{rank}.pth")


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.run(main, lambda: pathlib.Path(sys.argv[1]))
