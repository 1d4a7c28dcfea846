"""The four commands as a user types them, and in this process: what they leave, which images they use, their errors."""

import contextlib
import itertools
import json
import os
import pathlib
import pickle
import shutil
import sys
import types

import pytest
import torch
from conftest import CLASSES, ROOT, launch, make_tree, run

import search
import tester
from dataloader import Loader
from engines import local_engine
from images.dataset import Data, DataConfig, scan, training_plan
from network import ShuffleNetV2, ShuffleNetV2OneShot
from space import weight_files
from space.custom import make_space
from space.limits import offer
from space.search_space import SearchSpace
from training import checkpoint
from training.run import contents_of
from utils import UserError

SPACE = SearchSpace.for_images(16, 3)
EVOLUTION = "--population 4 --select 2 --mutation 1 --crossover 1 --generations 1"
SUPERNET = "--iterations 4 --batch-size 9 --val-every 4 --save-every 2 --warmup 2 --val-paths 1"
SCRATCH = "--iterations 4 --batch-size 9 --val-every 4 --save-every 2 --warmup 2 --bn-pass 3"
CALIBRATION = "--bn-batches 2 --bn-batch-size 9"


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    """A folder with a trained supernet and the search space."""
    out = tmp_path_factory.mktemp("run")
    run("supernet.py", *data, SUPERNET, CALIBRATION, "--out", out)
    run("tester.py", "--mode", "gen", "--out", out)
    return out


@pytest.fixture(scope="module")
def typed(data, out, tmp_path_factory):
    """A copy of it in which a user has searched, in a process, and retrained; what both commands printed."""
    out = shutil.copytree(out, tmp_path_factory.mktemp("typed"), dirs_exist_ok=True)
    searched = launch("search.py", *data, CALIBRATION, EVOLUTION, "--out", out)
    best = ("--architecture", out / "checkpoints" / "best.json")
    retrained, _ = run("scratch.py", *data, SCRATCH, *best, "--out", out)
    return out, searched, last_json(retrained)


def last_json(stdout):
    return json.loads(stdout.splitlines()[-1])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- as a user types them ------------------------------------------------------------------------------------


def test_supernet_leaves_a_complete_checkpoint(typed):
    folder = typed[0] / "checkpoints" / "supernet"
    assert {"run.log", "config.yml", "log.jsonl", "tensorboard"} <= {p.name for p in folder.iterdir()}
    model, stored = checkpoint.load_supernet(None, typed[0])
    assert stored.content["step"] == 4 and stored.space == SPACE == model.space
    assert stored.data == DataConfig(input_size=16, val_resize=18, heldout_per_class=3)
    assert f" space: {offer(SPACE)}\n" in (folder / "run.log").read_text()
    assert stored.split["heldout_per_class"] == 3 and stored.classes == ("apple", "bird", "car")
    assert lines(folder / "log.jsonl")[-1]["step"] == 4 and "val/acc1" in lines(folder / "log.jsonl")[-1]


def test_search_leaves_its_artefacts(typed):
    out, (stdout, stderr), _ = typed
    assert "http://127.0.0.1:" in stderr and f"report: {out / 'report.html'}" in stderr
    assert (out / "report.html").is_file() and (out / "figures" / "plane.svg").is_file()
    assert f" space: {offer(SPACE)}\n" in stderr
    results = lines(out / "acc" / "000.jsonl")
    assert len({tuple(r["architecture"]) for r in results}) == 4 and all(r["n_images"] == 9 for r in results)
    assert results == sorted(results, key=lambda r: (-r["acc1"], -r["acc5"]))
    for name, result in zip(["000_000", "000_001", "000_002", "000_003"], results, strict=True):
        stored = SPACE.load_architecture(out / "checkpoints" / f"{name}.json")
        assert list(stored) == result["architecture"]
        assert result["flops"] == SPACE.flops(stored) <= SPACE.cost_value("flops", "59%")
    trials = json.loads((out / "id2cand" / "000.json").read_text())
    assert sorted(itertools.chain(*trials.values())) == sorted(r["architecture"] for r in results)
    assert list(SPACE.load_architecture(out / "checkpoints" / "best.json")) == results[0]["architecture"]
    retrain, choose, channels, _ = stdout.split("retrain the best:\n")[1].splitlines()
    assert "scratch.py --architecture" in retrain and "choose --iterations, --batch-size and --lr" in choose
    assert "search its channels" in channels


def test_the_local_engine_finds_the_same(typed, data, tmp_path, forked, monkeypatch):
    """Bit for bit, though NNI's trials were other processes: without NNI installed, too."""
    out, (printed, _), _ = typed
    monkeypatch.setitem(sys.modules, "nni", None)
    monkeypatch.setattr(search, "write_report", lambda out: out)
    run("tester.py", "--mode", "gen", "--out", tmp_path)
    supernet = checkpoint.newest(out / "checkpoints" / "supernet")
    words = (*data, CALIBRATION, EVOLUTION, "--engine", "local", "--checkpoint", supernet, "--out", tmp_path)
    stdout, stderr = run("search.py", *words)
    table, its_table = (text.split("retrain the best")[0] for text in (stdout, printed))
    assert "NNI" not in stderr and table == its_table and "architecture" in table
    theirs, ours = ([r | {"seconds": 0} for r in lines(o / "acc" / "000.jsonl")] for o in (out, tmp_path))
    assert theirs == ours
    trials = json.loads((tmp_path / "id2cand" / "000.json").read_text())
    assert sorted(itertools.chain(*trials.values())) == sorted(r["architecture"] for r in ours)
    architectures = {p.name: p.read_text() for p in (out / "checkpoints").glob("*.json")}
    assert architectures == {p.name: p.read_text() for p in (tmp_path / "checkpoints").glob("*.json")}


def test_a_search_by_the_loss(typed, data, tmp_path, forked):
    """Of the same first candidates, in another order; the loss has a column, in the table and in the report."""
    out = typed[0]
    run("tester.py", "--mode", "gen", "--out", tmp_path)
    supernet = checkpoint.newest(out / "checkpoints" / "supernet")
    words = (*data, CALIBRATION, EVOLUTION, "--engine", "local", "--checkpoint", supernet, "--out", tmp_path)
    stdout, _ = run("search.py", *words, "--rank-by", "loss")
    theirs, ours = ([r | {"seconds": 0} for r in lines(o / "acc" / "000.jsonl")] for o in (out, tmp_path))
    assert sorted(r["loss"] for r in theirs) == [r["loss"] for r in ours] == [-r["score"] for r in ours]
    assert list(SPACE.load_architecture(tmp_path / "checkpoints" / "best.json")) == ours[0]["architecture"]
    head, first = stdout.splitlines()[1:3]
    assert head.split()[-2:] == ["loss", "architecture"] and f"{ours[0]['loss']:.3f}" in first
    assert f"<td>{ours[0]['loss']:.3f}</td>" in (tmp_path / "report.html").read_text()


def test_a_trial_and_a_test_agree(typed, data):
    """What the search measured for its best candidate is what a user measures."""
    out = typed[0]
    words = ("tester.py", *data, CALIBRATION, "--out", out, "--architecture", out / "checkpoints" / "best.json")
    stdout, stderr = run(*words, "--no-mirror", "--crop-scale", 0.08, 1)
    assert "warning: --mirror False: the supernet was trained with True, which is used\n" in stderr
    assert "--crop-scale" not in stderr.split("command: ")[0]
    result = last_json(stdout)
    (same,) = [r for r in lines(out / "acc" / "000.jsonl") if r["architecture"] == result["architecture"]]
    assert {**result, "seconds": 0, "halves": same["halves"]} == {**same, "seconds": 0}


def test_what_scratch_measures_can_be_measured_again(typed, data, tmp_path):
    out, _, result = typed
    folder, best = out / "checkpoints" / "scratch", out / "checkpoints" / "best.json"
    assert result["architecture"] == list(SPACE.load_architecture(best)) and result["n_images"] == 21
    assert result["params"] == SPACE.params(result["architecture"])
    stdout, _ = run("scratch.py", "--eval", *data, "--out", out)
    again = last_json(stdout)
    assert again == {name: result[name] for name in again} and {"acc1", "acc5", "flops"} <= again.keys()

    weights = weight_files.load(folder / "bnps-checkpoint.pth", "scratch").weights
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "official.pth.tar")
    official = ("--checkpoint", tmp_path / "official.pth.tar", "--architecture", best)
    stdout, _ = run("scratch.py", "--eval", *data, *official, "--out", tmp_path)
    assert last_json(stdout) == again
    _, stderr = run(
        "scratch.py", "--eval", *data, "--out", out, "--architecture", ROOT / "architecture_final.json", code=2
    )
    assert "contradicts" in stderr and len(stderr.splitlines()) == 1


def test_a_trial_looks_at_its_own_images_alone(typed, data, tmp_path, monkeypatch, touched, tree):
    """Not at the folders, nor at the other files: a data set may have a million. With both engines."""
    out, reported = typed[0], []
    settings = out / "checkpoints" / "search" / "trial.yml"
    monkeypatch.setattr("engines.trial.receive_candidates", lambda: [[0] * 20, [1] * 20])
    monkeypatch.setattr("engines.trial.heartbeats", contextlib.nullcontext)
    monkeypatch.setattr("engines.trial.report", lambda results: reported.extend(results))
    monkeypatch.setattr("utils.end_with_parent", lambda: None)
    args = tester.parse_args(["--config", str(settings), "--cache", str(tmp_path / "cache")])
    touched.clear()
    tester.run_trial(args)
    images = {path for what, path in touched if path.startswith(str(tree)) and what == "open"}
    looked_at = {path for _, path in touched if path.startswith(str(tree))}
    assert len(images) == 18 + 9 and looked_at == images
    assert [r["architecture"] for r in reported] == [[0] * 20, [1] * 20]
    said = []
    monkeypatch.setattr("nni.report_final_result", said.append)
    with pytest.raises(UserError):
        tester.run_trial(types.SimpleNamespace(**vars(args) | {"checkpoint": str(tmp_path / "gone.pth")}))
    assert f"{tmp_path}/gone.pth: can't be read (No such file" in said[0]["error"]
    assert said[0]["candidates"] == [[0] * 20, [1] * 20]

    trial = {name: value for name, value in vars(args).items() if name != "split"} | {
        "cache": str(tmp_path / "another")
    }
    touched.clear()
    results = local_engine._evaluate(json.dumps(trial), [[0] * 20, [1] * 20])
    local_engine._opened.cache_clear()
    assert {path for _, path in touched if path.startswith(str(tree))} == images
    assert [r | {"seconds": 0} for r in results] == [r | {"seconds": 0} for r in reported]


# --- which images --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tree):
    """The files of train that are not held out and those that are, of all of train, and of val; sorted."""
    images = Data(tree, DataConfig(16, 18, heldout_per_class=3), os.environ["TEST_CACHE"])
    found = {part: images.images(part) for part in ("supernet", "search", "train", "val")}
    assert [len(part) for part in found.values()] == [27, 9, 36, 21]
    return {part: sorted(f"{image_set.root}/{path}" for path in image_set.paths) for part, image_set in found.items()}


def files(used, augmented):
    return [path for flag, batch in used for path in batch if flag == augmented]


def test_the_supernet_trains_on_what_is_not_held_out_and_is_validated_on_what_is(data, parts, used, tmp_path):
    run("supernet.py", "--cache", tmp_path / "cache", *data, SUPERNET, CALIBRATION, "--out", tmp_path)
    assert sorted(files(used, augmented=False)) == parts["search"]
    assert sorted(files(used, augmented=True)[:27]) == parts["supernet"]  # an epoch of three steps
    assert len(files(used, augmented=True)) == (4 + 2) * 9 and set(files(used, augmented=True)) == set(
        parts["supernet"]
    )


@pytest.mark.parametrize("split", ["search", "val"])
def test_candidates_are_calibrated_on_the_images_of_training_and_measured_on_others(
    data, out, parts, used, tmp_path, split
):
    words = (*data, CALIBRATION, "--out", out, "--architecture", ROOT / "architecture_final.json", "--split", split)
    stdout, _ = run("tester.py", "--cache", tmp_path / "cache", *words)
    assert last_json(stdout)["n_images"] == len(parts[split])
    assert sorted(files(used, augmented=False)) == parts[split]
    calibrated = files(used, augmented=True)
    assert len(calibrated) == len(set(calibrated)) == 18 and set(calibrated) < set(parts["supernet"])


def test_scratch_trains_on_all_of_train_and_passes_over_the_next_batches(data, parts, used, tmp_path, tree):
    """The BN statistics of the result are the plain averages over the batches that follow those of training."""
    stdout, _ = run("scratch.py", "--cache", tmp_path / "cache", *data, SCRATCH, "--out", tmp_path)
    assert sorted(files(used, augmented=True)[:36]) == parts["train"]  # an epoch of four steps
    assert sorted(files(used, augmented=False)) == parts["val"]
    folder, result = tmp_path / "checkpoints" / "scratch", last_json(stdout)
    trained, passed = (
        weight_files.load(folder / name, "scratch") for name in ("checkpoint-0000004.pth", "bnps-checkpoint.pth")
    )
    loader = Loader(scan(tree / "train"), trained.data, True, backend="torchvision", workers=0)
    following = [images for images, _ in loader.batches(training_plan(36, 9, 0, 4, 7))]
    network = ShuffleNetV2(trained.architecture, space=SPACE)
    network.load_state_dict(trained.weights)
    with torch.no_grad():
        outputs = [network.first_conv[0](images) for images in following]
    for name, expected in (
        ("running_mean", [x.mean((0, 2, 3)) for x in outputs]), ("running_var", [x.var((0, 2, 3)) for x in outputs])
    ):  # fmt: skip
        torch.testing.assert_close(passed.weights[f"first_conv.1.{name}"], sum(expected) / 3, rtol=1e-5, atol=1e-5)
    for name, tensor in trained.weights.items():
        assert torch.equal(tensor, passed.weights[name]) != ("running" in name or "num_batches" in name), name
    stdout, _ = run("scratch.py", "--eval", *data, "--checkpoint", folder / "checkpoint-0000004.pth")
    measured = last_json(stdout)
    assert (measured["acc1"], measured["acc5"]) == (result["acc1_no_pass"], result["acc5_no_pass"])


def test_without_a_bn_pass_the_result_is_that_of_training(data, tmp_path, tree):
    """And a run that is resumed has the same images of train."""
    images = shutil.copytree(tree, tmp_path / "images")
    words = (*data, "--data-dir", images, SCRATCH, "--bn-pass", 0, "--iterations", 1, "--out", tmp_path)
    stdout, _ = run("scratch.py", *words)
    result = last_json(stdout)
    assert (result["acc1"], result["acc5"]) == (result["acc1_no_pass"], result["acc5_no_pass"])
    path = tmp_path / "checkpoints" / "scratch" / "checkpoint-0000001.pth"
    content = torch.load(path)
    (images / "val" / "apple" / "000.jpg").rename(images / "train" / "apple" / "new.jpg")
    _, stderr = run("scratch.py", *words, code=2)
    assert "train had 36 images, " in stderr and "now it has 37 images, " in stderr and "--resume none" in stderr
    (images / "train" / "apple" / "new.jpg").unlink()
    _, stderr = run("scratch.py", *words)
    assert "warning" in stderr and "val had 21 images, " in stderr and "now it has 20 images, " in stderr
    del content["images"]  # as before there was one
    torch.save(content, path)
    _, stderr = run("scratch.py", *words)
    assert f"warning: {path}: does not tell its images" in stderr


# --- one command after the other -----------------------------------------------------------------------------


def test_a_finished_run_says_so_and_starts_nothing(out, data, used):
    before = checkpoint.newest(out / "checkpoints" / "supernet").stat().st_mtime_ns
    _, stderr = run("supernet.py", *data, SUPERNET, CALIBRATION, "--out", out)
    assert "finished" in stderr and "does not tell its images" not in stderr and not used
    assert checkpoint.newest(out / "checkpoints" / "supernet").stat().st_mtime_ns == before


def test_gen_writes_nnis_form_from_anywhere(tmp_path):
    stdout, _ = run("tester.py", "--mode", "gen", "--out", pathlib.Path("here"), cwd=tmp_path)
    space = json.loads((tmp_path / "here" / "nni_auto_gen_search_space.json").read_text())
    assert list(space) == [f"LayerChoice{i}" for i in range(1, 21)] and "20 choice blocks" in stdout
    assert stdout.splitlines()[1] == (
        "all candidates at 224 px with 1000 classes: FLOPs 270.4M to 398.6M, parameters 3.155M to 3.871M; "
        "candidates differ by less than a factor of 1.5 in all of these, which leaves little to find"
    )
    operations = ["shufflenet_3x3", "shufflenet_5x5", "shufflenet_7x7", "xception_3x3"]
    assert space["LayerChoice7"] == {"_type": "layer_choice", "_value": operations}


def test_a_flops_table_is_what_the_search_counts_by(out, data, tmp_path, forked, monkeypatch):
    """With costs ten times the analytic ones: in the limit, the results and, for --resume, the settings."""
    monkeypatch.setattr(search, "write_report", lambda out: out)
    table, entries = tmp_path / "table.pkl", {}
    for shape, row in zip(SPACE.blocks, SPACE.costs.flops):
        key = (shape.in_channels, shape.out_channels, shape.mid_channels(), shape.in_size, shape.in_size, shape.stride)
        for operation, flops in zip(SPACE.operations, row):
            entries.setdefault(f"{operation}_stride_{shape.stride}", {})[key] = 10 * flops
    entries["conv1"] = {(3, 16, 16, 16, 1): 10 * SPACE.costs.stem_flops}
    entries["rest_operation"] = {(640, 3, 1, 1, 1): 10 * SPACE.costs.tail_flops}
    run("tester.py", "--mode", "gen", "--out", tmp_path)
    small = "--population 3 --select 1 --mutation 0 --crossover 0 --generations 1 --engine local"
    supernet = checkpoint.newest(out / "checkpoints" / "supernet")
    words = (*data, CALIBRATION, small, "--checkpoint", supernet, "--out", tmp_path)
    limit = 10 * SPACE.quantile("flops", 0.59)

    def refused(*more):
        _, stderr = run("search.py", *words, *more, code=2)
        assert len(stderr.splitlines()) == 1
        return stderr

    table.write_bytes(pickle.dumps(entries))
    lowest = f"the lowest cost of any candidate, {10 * SPACE.cost_range('flops')[0]};"
    assert lowest in refused("--flops-table", table, "--flops-limit", limit // 10)
    _, stderr = run("search.py", *words, "--flops-table", table, "--flops-limit", limit)
    first = "shufflenet_3x3_stride_2 (16, 64, 32, 16, 16, 2) is"
    assert f"warning: {table} differs from the analytic count: {first}" in stderr
    results = lines(tmp_path / "acc" / "000.jsonl")
    assert len(results) == 3 and all(r["flops"] == 10 * SPACE.flops(r["architecture"]) <= limit for r in results)
    run("search.py", "--out", tmp_path, "--resume")  # with the table that it had
    entries["conv1"] = {(3, 16, 16, 16, 1): 11 * SPACE.costs.stem_flops}
    table.write_bytes(pickle.dumps(entries))
    assert "other settings: --flops-table other FLOPs than then; leave" in refused("--resume")


def test_official_weights_warn_that_the_search_images_were_seen(out, data, tmp_path):
    model, _ = checkpoint.load_supernet(None, out)
    official = tmp_path / "checkpoint-150000.pth.tar"
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, official)
    words = (*data, CALIBRATION, "--out", tmp_path, "--architecture", ROOT / "architecture_final.json")
    stdout, stderr = run("tester.py", *words, "--checkpoint", official)
    assert "seen in training" in stderr and last_json(stdout)["n_images"] == 9


# --- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", ["supernet.py", "tester.py --architecture x", "search.py", "scratch.py", "scratch.py --eval"]
)
def test_without_imagenet_one_line_says_so(script, tmp_path):
    words = (*script.split(), "--data-dir", "data/imagenet", "--out", tmp_path)  # relative to a folder without one
    stdout, stderr = run(*words, code=2, cwd=tmp_path)
    assert stdout == "" and len(stderr.splitlines()) == 1
    assert "data/imagenet/train" in stderr and "--demo" in stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "search.lock"]


def test_without_a_supernet_the_space_is_that_of_the_settings_file(tree, tmp_path):
    """Of as many classes as the data has; with another supernet, that counts, and a line says so."""
    path = tmp_path / "own.yml"
    path.write_text(f"common: {{data-dir: {tree}}}\nsupernet: {{space: varied, input-size: 32}}")
    words = ("tester.py", "--mode", "gen", "--config", path, "--out", tmp_path / "out")
    stdout, _ = run(*words)
    assert "7 choice blocks of 5 operations" in stdout and " at 32 px with 3 classes" in stdout
    assert f"no supernet in {tmp_path}/out: train it by supernet.py, or name its --out" in stdout.splitlines()
    assert "(with --engine local, without NNI)" in stdout
    space = make_space("small", None, None, 32, 3)
    model = ShuffleNetV2OneShot(space=space)
    contents = contents_of(space, DataConfig(32, 36), CLASSES)
    checkpoint.save(tmp_path / "x.pth", kind="supernet", step=1, model=model.state_dict(), **contents)
    stdout, _ = run(*words, "--checkpoint", tmp_path / "x.pth")
    assert "6 choice blocks" in stdout
    assert f"{tmp_path}/x.pth has another space than the section supernet of {path}, and counts" in stdout


def test_in_a_process_of_its_own_an_error_is_one_line_too(tmp_path):
    stdout, stderr = launch("report.py", tmp_path, code=2)
    assert stdout == "" and len(stderr.splitlines()) == 1 and stderr.startswith("report.py: error: ")


def test_a_flag_that_contradicts_the_checkpoint_is_refused(out, data):
    words = ("tester.py", "--mode", "test", *data, "--out", out, "--architecture", ROOT / "architecture_final.json")
    for flag, value in (("--input-size", 32), ("--heldout-per-class", 5)):
        _, stderr = run(*words, flag, value, code=2)
        assert f"{flag} {value} contradicts" in stderr


def test_names_that_are_not_utf8_are_printed_with_escapes(tmp_path, forked):
    """Of output folder, class and image. Standard output is strict here; only TensorBoard's curves are not written."""
    tree, out = make_tree(tmp_path / "tree", 4, 2), tmp_path / os.fsdecode(b"o\xff")
    for part in ("train", "val"):
        (tree / part / "car").rename(tree / part / os.fsdecode(b"c\xe9"))
    image = (tree / "val" / "bird" / "000.jpg").rename(tree / "val" / "bird" / os.fsdecode(b"\xe0.jpg"))
    data = (f"--data-dir {tree}", "--input-size 16 --heldout-per-class 1 --loader torchvision --workers 0 --threads 1")
    words = (*data, "--device cpu", "--out", out)
    training = "--iterations 1 --batch-size 4"
    _, stderr = run("supernet.py", *words, f"--space small {training} --val-paths 1 --sampler uniform", CALIBRATION)
    escaped = f"{tmp_path}/o\\udcff"
    warning = f"{escaped}/checkpoints/supernet/tensorboard: no curves, since TensorBoard needs names that are UTF-8"
    assert warning in stderr and f"--out '{escaped}'" in (out / "checkpoints/supernet/run.log").read_text()
    _, stderr = run("supernet.py", "--config", out / "checkpoints/supernet/config.yml")  # which has the names too
    assert "supernet: finished, nothing to do" in stderr
    assert run("tester.py", "--mode gen", "--out", out)[0].startswith(escaped)
    search = "--population 2 --generations 1 --select 1 --mutation 1 --crossover 1 --concurrency 1"
    _, stderr = run("search.py", *words, search, CALIBRATION, code=2)
    assert f"{escaped}: NNI needs names that are UTF-8" in stderr and not (out / "acc").exists()
    stdout, stderr = run("search.py", *words, "--engine local", search, CALIBRATION)
    assert "2 candidates evaluated" in stdout and escaped in (out / "report.html").read_text()
    assert "search/tensorboard: no curves" in stderr
    run("scratch.py", *words, training, "--bn-pass 0", "--architecture", out / "checkpoints/best.json")
    stdout, _ = run("scratch.py", *words, "--predict", image)
    assert stdout.startswith(f"{tree}/val/bird/\\udce0.jpg: ") and "c\\udce9 " in stdout
