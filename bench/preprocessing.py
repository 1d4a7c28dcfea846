"""What preprocessing inside an exported file costs in ONNX Runtime, beside its network of `varied` at 32 px.

    python -m bench.preprocessing

Prints median milliseconds by the clock of one thread, of 1 and of 8 images of 36 x 37 px: of the network alone, and of
the file without and with preprocessing, in turns. Needs ONNX's packages.
"""

import random
import statistics

import torch

from network import ShuffleNetV2, fold_bn
from settings.subjects import DataConfig
from space.custom import make_space
from training import export

BATCH_SIZES = (1, 8)
REPEATS = 20  # runs of `export.latencies`


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    space = make_space("varied", input_size=32, n_classes=9)
    network = fold_bn(ShuffleNetV2(space.random_candidate(random.Random(0)), space=space))
    config = DataConfig(input_size=32, val_resize=36)
    _, timed = export.onnx_file(network, config, True, {}, None)
    for n in BATCH_SIZES:
        plain, whole = (torch.randint(256, (n, *sides, 3), dtype=torch.uint8) for sides in ((32, 32), (36, 37)))
        inputs = [export.Input(config, False)(plain), plain, whole]
        rows = [list(export.latencies(timed, inputs).values()) for _ in range(REPEATS)]
        alone = statistics.median(ms for ms, _ in rows)
        forms = {name: statistics.median(by_form[name] for _, by_form in rows) for name in rows[0][1]}
        print(f"batch {n}: the network {alone:.3f}", *(f"{form} {ms:.3f}" for form, ms in forms.items()), sep=", ")


if __name__ == "__main__":
    main()
