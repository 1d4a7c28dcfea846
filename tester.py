"""Generates the search space, evaluates candidates in the supernet, and measures the latency of this device.

    python tester.py --mode gen                          writes OUT/nni_auto_gen_search_space.json
    python tester.py --mode latency                      measures this device, for search.py: OUT/latency.json
    python tester.py --mode latency --runtime onnxruntime    the same for networks in ONNX Runtime
    python tester.py --mode latency --elsewhere DIR      the same on another device, by the script in DIR
    python tester.py --mode test --architecture FILE     evaluates one candidate; the last line printed is JSON
    python tester.py --mode test                         as an NNI trial: receives its candidates from NNI

A candidate's BN statistics are recalibrated on training images, then its accuracy is measured on the images held out
for the search (`--split search`) or on val (`--split val`). Reads OUT/checkpoints/supernet (newest) or --checkpoint,
our own or official.
Source: paper section 3.4; official `src/Search/tester.py`.
"""

import utils  # first: sets GOMP_SPINCOUNT before torch is imported

# isort: split
import contextlib
import json
import os
import pathlib
import sys

from devices.elsewhere import results_path
from devices.table import (
    measure_table,
    open_runtime,
    read_table,
    setting_of,
    table_elsewhere,
    with_latency,
    write_networks,
)
from engines import trial
from engines.search_files import listed_images
from settings.command_line import Parser, command, setting_in, write_settings
from settings.subjects import DataConfig, Evaluation, Images, Run, Space, Testing, Weights
from space import own, weight_files
from space.custom import make_space
from space.flops_table import official_comparison
from space.limits import offer
from space.search_space import SearchSpace
from training import checkpoint
from training.evaluation import evaluate, evaluate_in_lists, open_evaluation, resolve_device


def make_parser():
    parser = Parser(__doc__, "tester")
    parser.add(Testing)
    parser.add(Weights, said="supernet")
    parser.add(Space, said="what NNI asks for")
    parser.add(Run)
    parser.add(DataConfig, defaults=DataConfig.unset())
    parser.add(Images)
    parser.add(Evaluation)
    return parser


def parse_args(argv=None):
    parser = make_parser()
    args = parser.parse(argv)
    if args.mode == "test":
        parser.refuse("--mode test, which takes the space of the supernet", "space")
    if args.mode != "latency":
        parser.refuse(f"--mode {args.mode}", "latency-batch-size", "runtime", "elsewhere")
    if args.elsewhere:
        args.runtime = "onnxruntime"
    if args.runtime == "onnxruntime" and args.device == "cuda":
        raise utils.UserError("--device cuda: ONNX Runtime is measured on the CPU; leave it out")
    return args


def open_space(args):
    """(the search space of --space, or else of the supernet, or else of its section in the settings file, or the
    paper's; a line on what does not go together, or None).

    A space says nothing of its images: where the supernet has the same one for other images, these count.
    """
    supernet = args.checkpoint or checkpoint.newest(pathlib.Path(args.out) / "checkpoints" / "supernet")
    in_file = args.space or setting_in(args.config, "supernet", "space")

    def given(*images, name=args.space):
        return make_space(name, args.architecture, args.own, *images, where=f"{args.config}: space")

    if not supernet:
        classes = [path for path in pathlib.Path(args.data_dir, "train").glob("[!.]*") if path.is_dir()]
        input_size = args.input_size or setting_in(args.config, "supernet", "input-size") or 224
        space = given(input_size, len(classes) or 1000, name=in_file)
        return space, f"no supernet in {args.out}: train it by supernet.py, or name its --out"
    space = given(args.input_size or 224)
    try:
        found = weight_files.load(supernet, "supernet", space).space
    except utils.UserError:
        if args.space:  # which needs no supernet
            return space, None
        raise
    same = in_file in (None, "channels") or given(found.input_size, found.n_classes, name=in_file) == found
    if args.space:
        return (found if same else space), None
    other = f"{supernet} has another space than the section supernet of {args.config}, and counts"
    return found, None if same else other


def generate(args):
    """Writes the search space in NNI's form, and prints what its candidates cost."""
    path = pathlib.Path(args.out) / "nni_auto_gen_search_space.json"
    space, note = open_space(args)
    utils.write_json(path, space.nni_search_space(), indent=1)
    sizes = sorted({len(names) for names in space.block_operations})
    operations = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
    widths = f" at {space.n_widths} widths" if space.n_widths > 1 else ""
    print(f"{path}: {space.n_blocks} choice blocks of {operations} operations{widths}")
    offered = [own.with_costs(space, own.REGISTRIES["cost"])]
    with contextlib.suppress(utils.UserError):  # where there is no table of this space
        table = read_table(pathlib.Path(args.out) / "latency.json", space, foreign=True)
        offered = with_latency(*offered, table), table["runtime"]
    print(offer(*offered))
    if line := official_comparison(SearchSpace()):
        print(line)
    if note:
        print(note)
    weights = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    print(f"next: {command('search.py', Run.of(vars(args)), args.own, *weights)}")
    if not setting_in(args.config, "search", "engine"):
        print("      (with --engine local, without NNI)")


def measure(args):
    """Writes the latencies of the search space on this device, or with --elsewhere, on another one."""
    path = pathlib.Path(args.out) / "latency.json"
    space, _ = open_space(args)
    device = resolve_device("cpu" if args.runtime == "onnxruntime" else args.device, args.threads)
    start_logging(args, device)
    if args.elsewhere and results_path(args.elsewhere).exists():
        table = table_elsewhere(space, args.elsewhere)
    else:
        runtime = open_runtime(args.runtime, space, args.latency_batch_size, device)
        if args.elsewhere:
            n, size = write_networks(args.elsewhere, runtime)
            print(f"{args.elsewhere}: {n} networks, {size / 1e6:.1f} MB; on the device, run python on_device.py in it")
            print("next: put its results.json into the folder, and run the same command again")
            return
        table = measure_table(runtime)
    utils.write_json(path, table)
    print(f"{path}: {setting_of(table)}; spread {table['spread']:.1%}")
    print(offer(with_latency(space, table), table["runtime"]))
    weights = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    print(f"next: {command('search.py', Run.of(vars(args)), args.own, '--limit', 'latency=50%', *weights)}")
    if table["spread"] > 0.05:
        print("warning: the spread is above 5%: measure again when nothing else runs on that machine")


def start_logging(args, device):
    folder = pathlib.Path(args.out) / "checkpoints" / "tester"
    utils.start_logging(folder, device, args.seed, own.commits())
    write_settings(folder / "config.yml", "tester", vars(args))


def run_trial(args):
    """An NNI trial: evaluates the candidates that NNI sends, and reports their results."""
    utils.end_with_parent()  # NNI's trial runner: without it nobody would receive the results
    candidates = trial.receive_candidates()
    with trial.heartbeats(), trial.errors_reported(candidates):
        trial.take_gpu(args.device)
        supernet, *batches = open_evaluation(vars(args), listed_images(args.out))
        trial.report(evaluate_in_lists(supernet, candidates, *batches, args.bn, amp=args.eval_amp))


def main(args):
    if args.mode == "gen":
        generate(args)
    elif args.mode == "latency":
        measure(args)
    elif args.architecture:
        supernet, calibration, validation = open_evaluation(vars(args))
        candidate = supernet.space.load_architecture(args.architecture)
        start_logging(args, calibration.loader.device)
        (result,) = evaluate(supernet, [candidate], calibration, validation, args.bn, amp=args.eval_amp)
        utils.log.info("top-1 %.2f%%, top-5 %.2f%% of %d images", result["acc1"], result["acc5"], result["n_images"])
        print(json.dumps({**result, "flops": supernet.space.flops(candidate)}))
    elif os.environ.get("NNI_PLATFORM"):
        run_trial(args)
    else:
        text = "--architecture: name the architecture file to evaluate (only search.py starts trials without it)"
        raise utils.UserError(text)
    sys.stdout.flush()


if __name__ == "__main__":
    utils.run_script(main, parse_args)
