"""Retrains one architecture from scratch, by default the published winner, and measures it on val.

    python scratch.py                                          architecture_final.json on ImageNet, official settings
    python scratch.py --demo --architecture checkpoints/best.json
    torchrun --nproc-per-node 8 scratch.py                     on eight GPUs
    python scratch.py --eval --checkpoint FILE                 measures a retrained network, ours, official, or exported
    python scratch.py --export FILE.pt2                        exports it by torch.export, or as ONNX (FILE.onnx)
    python scratch.py --export FILE.onnx --with-preprocessing  the same, for whole images of any size
    python scratch.py --predict IMAGE...                       prints the classes of image files, or all in a folder
    python scratch.py --predict IMAGE... --checkpoint FILE.onnx   by an exported file

Reads all of DIR/train, and DIR/val for the numbers reported. Writes OUT/checkpoints/scratch/: checkpoint-STEP.pth,
bnps-checkpoint.pth (after the final BN pass), log.jsonl, run.log, config.yml, tensorboard/. The last line printed is
JSON, except with --predict. The same command resumes an interrupted run.
Expected on ImageNet: 73.6 to 73.9% top-1 (reruns of the official code: 73.6 to 73.7; published: 74.4); not run here.
Source: paper section 4.1; official `src/Evaluation/train.py`.
"""

import utils  # first: sets GOMP_SPINCOUNT before torch is imported

# isort: split
import dataclasses
import itertools
import json
import pathlib

import torch

import network
from dataloader import Loader
from images.dataset import Data, evaluation_plan, prepare, scan, training_plan
from network import ShuffleNetV2
from settings.command_line import Parser, setting_in
from settings.fields import difference, flag
from settings.subjects import RUNTIMES, DataConfig, Images, Retraining, Run, Space, Training, Weights
from space import own
from space.custom import make_space, searched
from training import checkpoint, distributed
from training.evaluation import accuracy, recalibrate_bn, resolve_device, validation_batches
from training.export import export
from training.loop import train
from training.program import image_files, is_program, open_program, predict
from training.start import Start

ACCURACIES = ("acc1", "acc5", "n_images")


def make_parser():
    parser = Parser(__doc__, "scratch")
    parser.add(Space, said="the published architecture_final.json")
    parser.add(Retraining)
    parser.add(Weights, said="scratch")
    parser.add(Run)
    parser.add(DataConfig, defaults=DataConfig.unset())
    parser.add(Images)
    parser.add(Training, defaults={"iterations": 300_000})
    return parser


def parse_args(argv=None):
    parser = make_parser()
    args = parser.parse(argv)
    if not (args.eval or args.export or args.predict):
        parser.refuse("training, which starts from random weights", "checkpoint")
    if args.with_preprocessing and not args.export:
        raise utils.UserError("--with-preprocessing has no effect without --export: leave it out")
    if args.opset and pathlib.Path(args.export or "").suffix != ".onnx":
        raise utils.UserError("--opset has no effect without --export FILE.onnx: leave it out")
    if (args.predict or args.eval) and is_program(args.checkpoint):
        parser.refuse("an exported program", "architecture", "space")
    return args


def open_network(args, folder):
    """(network, its Checkpoint, DataConfig) of --checkpoint, by default the newest of the run."""
    final = folder / "bnps-checkpoint.pth"
    path = args.checkpoint or (final if final.exists() else checkpoint.newest(folder))
    if path is None:
        raise utils.UserError(f"--checkpoint: no network in {folder}; train one with scratch.py")
    space = space_of(args, args.input_size or 224, 1000)
    model, ckpt = network.read(path, args.architecture, space)
    if model.config is None:
        raise utils.UserError(f"{path}: {network.NOT_KNOWN}")
    return model, ckpt, DataConfig.resolve(given_pixels(args), ckpt.data, ckpt.path)


def given_pixels(args):
    """The given settings (name -> value) that decide which pixels a network is evaluated on."""
    return {name: value for name, value in DataConfig.given(vars(args)).items() if name in DataConfig.EVALUATES}


def space_of(args, input_size, n_classes):
    """The search space of the arguments."""
    where = f"{args.config}: space"
    return make_space(args.space, args.architecture, args.own, input_size, n_classes, where)


def val_batches(args, images, config, device):
    """Validation batches of val's images (an ImageSet)."""
    loader = Loader(images, config, False, args.seed, device, args.loader, args.workers)
    return validation_batches(loader, args.eval_batch_size, args.cache)


def evaluate_checkpoint(args, folder):
    """--eval: top-1 and top-5 of a retrained network, or of an exported file, on val."""
    image_settings = Images.of(vars(args))
    prepare(image_settings, args.demo)
    device = resolve_device(args.device, args.threads)
    program = program_of(args)
    if program and distributed.world_size() > 1:
        raise utils.UserError("--eval: an exported file is measured by one process: start it without torchrun")
    model, ckpt, config = (program.run, program, program.config) if program else open_network(args, folder)
    # Which images val has, and their groups; a CSV may have moved.
    given = {name: value for name in ("jfif", "group_by") if (value := getattr(args, name)) is not None}
    data = Data.of(image_settings, dataclasses.replace(config, **given))
    data.warn()
    checkpoint.check_classes(ckpt, data.classes)
    if program:
        known = {name: program.values[name] for name in ("architecture", "flops", "params")}
        return known | dict(zip(ACCURACIES, accuracy(model, program.batches(data.val, image_settings))))
    model.to(device, memory_format=torch.channels_last).eval()
    return summary(model, accuracy(model, val_batches(args, data.val, config, device)))


def program_of(args):
    """The exported Program that --checkpoint names, or None. Raises UserError where the flags contradict it."""
    if not is_program(args.checkpoint):
        return None
    if args.device == "cuda":
        raise utils.UserError(f"--device cuda: {args.checkpoint} is a program, which runs on the CPU here")
    program = open_program(args.checkpoint)
    DataConfig.resolve(given_pixels(args), program.config, args.checkpoint)
    return program


def export_checkpoint(args, folder):
    """--export: writes the network; prints how exact and how fast the file is."""
    resolve_device(args.device, args.threads)  # sets the threads
    model, ckpt, config = open_network(args, folder)
    images = None
    if args.with_preprocessing:
        if args.demo:
            prepare(Images.of(vars(args)), args.demo)
        val = pathlib.Path(args.data_dir, "val")
        images = scan(val) if val.is_dir() else None
        where = f"the images of {val}" if images else f"bundled images, since there are none in {val}"
        print(f"comparing the file with the network on {where}", flush=True)
    result = export(args.export, model, ckpt, config, bool(args.with_preprocessing), images, args.opset)
    exact = "{file}: logits within {max_difference:.1g} of the network's on {n_images} images"
    if args.with_preprocessing:
        exact += ", from the files on; {same_top1} get the same class, {same_pixels} the same pixels"
    print(exact.format(**result))
    how = "ms an image in {} on this CPU (medians of {runs} runs, batch 1, {threads} threads)"
    times = [f"{result['network_ms']} of the network alone, as --limit latency counts it"]
    times += [f"{ms} {form}" for form, ms in result["latency_ms"].items()]
    print(f"{how.format(RUNTIMES[result['runtime']], **result)}: {'; '.join(times)}")
    return result


def predict_images(args, folder):
    """--predict: a line for each image."""
    device = resolve_device(args.device, args.threads)
    image_settings = Images.of(vars(args))
    program = program_of(args)
    model, ckpt, config = (program.run, program, program.config) if program else open_network(args, folder)
    files = image_files(args.predict, config, image_settings)
    if program:
        batches = program.batches(files, image_settings)
    else:
        model.to(device, memory_format=torch.channels_last).eval()
        loader = Loader(files, config, False, 0, device, image_settings.loader, image_settings.workers)
        batches = loader.batches(evaluation_plan(len(files), image_settings.eval_batch_size))
    for path, classes in predict(files.paths, ckpt.class_names, model, batches):
        print(f"{path}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in classes), flush=True)


def summary(model, measured):
    space = model.space
    candidate = model.architecture
    costs = {"flops": space.flops(candidate), "params": space.params(candidate)}
    return {"architecture": list(candidate), **costs, **dict(zip(ACCURACIES, measured))}


def data_config(args, search):
    """(the DataConfig to train with, lines on how it differs from that of the search which found the architecture).

    What decides the pixels of evaluation is the search's, or a UserError; how images are varied in training may differ.
    """
    try:
        stored = DataConfig.from_dict(search["data"])
    except (KeyError, TypeError):
        raise utils.UserError(f"{search['state']}: not the state of a search") from None
    config = DataConfig.resolve(given_pixels(args), stored, search["state"])
    config = DataConfig.resolve(config.to_dict() | DataConfig.given(vars(args)))
    changes = difference((DataConfig,), stored.to_dict(), config.to_dict())
    return config, [f"other than in the search: {flag(name)} {change}" for name, change in changes.items()]


def image_changes(args, search, data):
    """Lines on how the images differ from those of the search. Raises UserError if their classes do."""
    if search["space"].n_classes != len(data.classes):
        counts = f"searched for {search['space'].n_classes} classes, the data has {len(data.classes)}"
        raise utils.UserError(f"{args.architecture}: {counts}; use the same --data-dir")
    path = search["state"].with_name("images.json")
    if not path.exists():
        return []
    listed = utils.read_json(path, most=None)
    if not checkpoint.same_classes(listed["classes"], data.classes):
        changes = checkpoint.class_changes(listed["classes"], data.classes)
        raise utils.UserError(f"{args.architecture}: searched for other classes: those of the data are {changes}")
    if listed["train"]["paths"] == list(data.train.paths):
        return []
    counts = {part: listed[part]["per_class"] for part in ("train", "val")}
    changes = checkpoint.count_changes(counts, data.counts, data.classes) or "they have other names"
    return [f"other images than in the search: {changes}"]


def no_architecture(args):
    """A line that says that the published architecture is not one of the space, and which file to name."""
    best = pathlib.Path(args.out, "checkpoints", "best.json")
    what = f"name that of the search, {best}" if best.exists() else f"no search has written {best}"
    return f"--architecture: the published one is not of this space: {what}"


def chosen(args, search, config, data):
    """(the SearchSpace, the candidate in it) of --architecture. Raises UserError if search or data contradict it."""
    space = space_of(args, config.input_size, len(data.classes))
    if search and dataclasses.replace(space, architecture=()) != dataclasses.replace(search["space"], architecture=()):
        raise utils.UserError(f"--space contradicts {search['state']}, which has another space; leave it out")
    try:
        return space, space.load_architecture(args.architecture or utils.HERE / "architecture_final.json")
    except utils.UserError as error:
        if not args.architecture:
            raise utils.UserError(no_architecture(args)) from None
        if search or args.space:
            raise
        raise utils.UserError(f"{error}; name its search space by --space, if that is another one") from None


def retrain(args, folder):
    """Trains, runs the final BN pass, and returns the numbers before (`_no_pass`) and after it."""
    own.load(args.own)  # first: the record of a search is read with its hash of own operations
    known = distributed.on_rank0(lambda: args.resume != "none" and checkpoint.newest(folder))
    given = args.architecture or args.space or known
    if not given and setting_in(args.config, "supernet", "space") not in (None, "blocks"):
        raise utils.UserError(no_architecture(args))
    search = args.architecture and searched(args.architecture)
    config, changes = data_config(args, search) if search else (None, [])
    start = Start("scratch", vars(args), config)
    changes += image_changes(args, search, start.data) if search else []
    space, candidate = chosen(args, search, start.config, start.data)
    loader = start.loader("train", augment=True)
    validation = start.validation("val")
    run = start.run(space, loader, architecture=list(candidate))
    for text in changes:
        utils.log.info(text)
    if args.architecture and not search:
        assumed = f"{space.n_blocks} blocks of {', '.join(space.operations)}, images of {space.input_size} px"
        utils.log.info("%s: no record of a search beside it; assumes %s", args.architecture, assumed)

    torch.manual_seed(args.seed)
    model = ShuffleNetV2(candidate, space=space)
    costs = space.flops(candidate) / 1e6, space.params(candidate) / 1e6
    utils.log.info("%s: %.1fM multiply-adds, %.2fM parameters", list(candidate), *costs)

    def validate(step):
        distributed.together(validation.prepare)
        distributed.broadcast_from_rank0(model.buffers())  # each rank has BN statistics of its own
        acc1, acc5, n_images = accuracy(model.eval(), validation)
        utils.log.info("step %d  val: top-1 %.2f%%, top-5 %.2f%% of %d images", step, acc1, acc5, n_images)
        return {"val/acc1": acc1, "val/acc5": acc5}

    metrics = train(model, loader, start.training, None, validate, run, device=start.device, seed=args.seed)
    before = {"acc1_no_pass": metrics["val/acc1"], "acc5_no_pass": metrics["val/acc5"], "seconds": metrics["seconds"]}
    # Official `bnps-` checkpoint: BN momentum 1/i over training batches at learning rate 0, so a plain average.
    if args.bn_pass:
        end = args.iterations + args.bn_pass
        plan = training_plan(len(loader.images), args.batch_size, args.seed, args.iterations, end)
        share = itertools.islice(plan, distributed.rank(), None, distributed.world_size())
        recalibrate_bn(model, model, loader.batches(share), "average", sharded=distributed.world_size() > 1)
    result = summary(model, accuracy(model.eval(), validation)) | before
    if distributed.rank() == 0:
        path = folder / "bnps-checkpoint.pth"
        values = {"kind": "scratch", "step": args.iterations, "metrics": result, **run.contents}
        checkpoint.save(path, model=model.state_dict(), **values)
    utils.log.info("val after the BN pass: top-1 %.2f%%, top-5 %.2f%%", result["acc1"], result["acc5"])
    return result


def main(args):
    distributed.join(args.device)
    folder = pathlib.Path(args.out, "checkpoints", "scratch")
    if args.predict:
        predict_images(args, folder)
    else:
        result = (evaluate_checkpoint if args.eval else export_checkpoint if args.export else retrain)(args, folder)
        if distributed.rank() == 0:
            print(json.dumps(result))


if __name__ == "__main__":
    distributed.run(main, parse_args)
