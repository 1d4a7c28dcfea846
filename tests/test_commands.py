"""The four commands end to end, as a person types them, on a few of the bundled images; and their errors."""

import importlib
import json
import pathlib
import pickle

import pytest
import torch
from conftest import ROOT, run

from space.search_space import SearchSpace
from training import checkpoint
from utils import write_settings

SMALL = ("--demo", "--heldout-per-class", 4, "--bn-batches", 2, "--bn-batch-size", 32)
FAST = ("--batch-size", 16, "--val-every", 6, "--save-every", 3, "--warmup", 2)
SPACE = SearchSpace.for_images(28, 10)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with a trained supernet, the search space and a search of 2 generations of 4."""
    out = tmp_path_factory.mktemp("run")
    run("supernet.py", *SMALL, *FAST, "--iterations", 6, "--val-paths", 1, "--out", out)
    run("tester.py", "--mode", "gen", "--out", out)
    return out


@pytest.fixture(scope="module")
def searched(out):
    small = ("--population", 4, "--select", 2, "--mutation", 1, "--crossover", 1, "--generations", 2)
    return run("search.py", *SMALL, *small, "--out", out)


def last_json(stdout):
    return json.loads(stdout.splitlines()[-1])


def test_supernet_leaves_a_complete_checkpoint(out):
    folder = out / "checkpoints" / "supernet"
    assert {"run.log", "config.yml", "log.jsonl", "tensorboard"} <= {p.name for p in folder.iterdir()}
    model, stored = checkpoint.load_supernet(None, out)
    assert stored.content["step"] == 6 and stored.space == SPACE == model.space
    assert (
        stored.data.crop_scale == (0.8, 1.0) and stored.split["heldout_per_class"] == 4 and "sneaker" in stored.classes
    )
    assert "val/acc1" in json.loads((folder / "log.jsonl").read_text().splitlines()[-1])


def test_a_finished_run_says_so_and_starts_nothing(out):
    before = checkpoint.newest(out / "checkpoints" / "supernet").stat().st_mtime_ns
    _, stderr = run("supernet.py", *SMALL, *FAST, "--iterations", 6, "--val-paths", 1, "--out", out)
    assert "finished" in stderr
    assert checkpoint.newest(out / "checkpoints" / "supernet").stat().st_mtime_ns == before


def test_gen_writes_nnis_form(out):
    space = json.loads((out / "nni_auto_gen_search_space.json").read_text())
    assert list(space) == [f"LayerChoice{i}" for i in range(1, 21)]
    assert space["LayerChoice7"] == {
        "_type": "layer_choice",
        "_value": ["shufflenet_3x3", "shufflenet_5x5", "shufflenet_7x7", "xception_3x3"],
    }


def test_a_candidate_is_evaluated_without_nni(out, tmp_path):
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps([2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3]))
    results = []
    for file in (ROOT / "architecture_final.json", plain):
        stdout, _ = run("tester.py", "--mode", "test", *SMALL, "--out", out, "--architecture", file)
        results.append(last_json(stdout))
    assert results[0]["flops"] == SPACE.flops(results[0]["architecture"]) and results[0]["n_images"] == 40
    assert all(results[0][k] == results[1][k] for k in ("architecture", "flops", "acc1", "acc5", "n_images"))
    stdout, _ = run("tester.py", "--mode", "test", *SMALL, "--out", out, "--architecture", plain, "--split", "val")
    assert last_json(stdout)["n_images"] == sum(1 for _ in (ROOT / "data" / "fashion-mnist" / "val").glob("*/*.jpg"))


def test_search_leaves_its_artefacts(out, searched):
    stdout, stderr = searched
    assert "http://127.0.0.1:" in stderr
    assert (
        f"report: {out / 'report.html'}" in stderr
        and (out / "report.html").is_file()
        and (out / "figures" / "plane.svg").is_file()
    )
    lines = [[json.loads(line) for line in (out / "acc" / f"00{g}.jsonl").read_text().splitlines()] for g in (0, 1)]
    for generation, results in enumerate(lines):
        assert len(results) == 4
        assert results == sorted(results, key=lambda r: (-r["acc1"], -r["acc5"]))
        for rank, result in enumerate(results):
            stored = SPACE.load_architecture(out / "checkpoints" / f"{generation:03}_{rank:03}.json")
            assert list(stored) == result["architecture"] and result["flops"] == SPACE.flops(
                stored
            ) <= SPACE.flops_value("59%")
        trials = json.loads((out / "id2cand" / f"{generation:03}.json").read_text())
        assert sorted(c for candidates in trials.values() for c in candidates) == sorted(
            r["architecture"] for r in results
        )
    assert len({tuple(r["architecture"]) for results in lines for r in results}) == 8
    best = max((r for results in lines for r in results), key=lambda r: (r["acc1"], r["acc5"]))
    assert list(SPACE.load_architecture(out / "checkpoints" / "best.json")) == best["architecture"]
    assert "scratch.py --architecture" in stdout.splitlines()[-1]


def test_the_local_engine_finds_the_same(out, searched, tmp_path):
    """Bit for bit, though NNI's trials were two at a time and here one worker has all: without NNI installed, too."""
    (tmp_path / "nni.py").write_text("raise ImportError('no NNI here')")
    run("tester.py", "--mode", "gen", "--out", tmp_path)
    words = (
        "--engine",
        "local",
        "--concurrency",
        1,
        "--threads",
        1,
        "--checkpoint",
        checkpoint.newest(out / "checkpoints" / "supernet"),
    )
    small = ("--population", 4, "--select", 2, "--mutation", 1, "--crossover", 1, "--generations", 2)
    stdout, stderr = run("search.py", *SMALL, *small, *words, "--out", tmp_path, PYTHONPATH=str(tmp_path))
    assert "NNI" not in stderr and stdout.splitlines()[:-1] == searched[0].splitlines()[:-1]
    for generation in ("000", "001"):
        a, b = (
            [json.loads(line) | {"seconds": 0} for line in (o / "acc" / f"{generation}.jsonl").read_text().splitlines()]
            for o in (out, tmp_path)
        )
        assert a == b
        trials = json.loads((tmp_path / "id2cand" / f"{generation}.json").read_text())
        assert sorted(c for candidates in trials.values() for c in candidates) == sorted(r["architecture"] for r in a)
    architectures = {p.name: p.read_text() for p in (out / "checkpoints").glob("*.json")}
    assert architectures == {p.name: p.read_text() for p in (tmp_path / "checkpoints").glob("*.json")}


def test_a_flops_table_is_what_the_search_counts_by(out, tmp_path):
    """With costs ten times the analytic ones: in the limit, the results and, for --resume, the settings."""
    table, entries = tmp_path / "table.pkl", {}
    for shape, row in zip(SPACE.blocks, SPACE.choice_flops):
        key = (shape.in_channels, shape.out_channels, shape.mid_channels(), shape.in_size, shape.in_size, shape.stride)
        for operation, flops in zip(SPACE.operations, row):
            entries.setdefault(f"{operation}_stride_{shape.stride}", {})[key] = 10 * flops
    entries["conv1"] = {(3, 16, 28, 28, 1): 10 * SPACE.costs.stem_flops}
    entries["rest_operation"] = {(640, 10, 2, 2, 1): 10 * (SPACE.fixed_flops - SPACE.costs.stem_flops)}
    run("tester.py", "--mode", "gen", "--out", tmp_path)
    small = (
        "--population",
        3,
        "--select",
        1,
        "--mutation",
        0,
        "--crossover",
        0,
        "--generations",
        1,
        "--engine",
        "local",
    )
    words = (*SMALL, *small, "--checkpoint", checkpoint.newest(out / "checkpoints" / "supernet"), "--out", tmp_path)

    def refused(*more):
        _, stderr = run("search.py", *words, *more, code=2)
        assert len(stderr.splitlines()) == 1
        return stderr

    table.write_bytes(pickle.dumps(print))
    assert f"{table}: not a plain FLOPs table (holds" in refused("--flops-table", table)
    table.write_bytes(pickle.dumps(entries))
    lowest = f"the lowest cost of any candidate, {10 * SPACE.flops_range[0]};"
    assert lowest in refused("--flops-table", table, "--flops-limit", "24M")
    _, stderr = run("search.py", *words, "--flops-table", table, "--flops-limit", "240M")
    assert (
        f"warning: {table} differs from the analytic count: shufflenet_3x3_stride_2 (16, 64, 32, 28, 28, 2) is"
        in stderr
    )
    results = [json.loads(line) for line in (tmp_path / "acc" / "000.jsonl").read_text().splitlines()]
    assert len(results) == 3 and all(r["flops"] == 10 * SPACE.flops(r["architecture"]) <= 240_000_000 for r in results)
    assert "other settings: costs None (was" in refused("--flops-limit", "240M", "--resume")
    run("search.py", *words, "--flops-table", table, "--flops-limit", "240M", "--resume")


def test_a_trial_and_a_test_agree(out, searched, tmp_path):
    """What the search measured for its best candidate is what a person measures."""
    stdout, _ = run(
        "tester.py", "--mode", "test", *SMALL, "--out", out, "--architecture", out / "checkpoints" / "best.json"
    )
    result = last_json(stdout)
    measured = [json.loads(line) for path in (out / "acc").glob("*.jsonl") for line in path.read_text().splitlines()]
    (same,) = [r for r in measured if r["architecture"] == result["architecture"]]
    assert (result["acc1"], result["acc5"]) == (same["acc1"], same["acc5"])


def test_scratch_retrains_and_evaluates(out, searched):
    demo = ("--demo", "--out", out)
    stdout, _ = run(
        "scratch.py",
        *demo,
        *FAST,
        "--iterations",
        6,
        "--bn-pass",
        3,
        "--architecture",
        out / "checkpoints" / "best.json",
    )
    result = last_json(stdout)
    assert (
        result["params"] == SPACE.params(result["architecture"]) and {"acc1", "acc5", "acc1_no_pass"} <= result.keys()
    )
    assert {"checkpoint-0000006.pth", "bnps-checkpoint.pth"} <= {
        p.name for p in (out / "checkpoints" / "scratch").iterdir()
    }
    stdout, _ = run("scratch.py", "--eval", *demo)
    again = last_json(stdout)
    assert (again["acc1"], again["acc5"], again["architecture"]) == (
        result["acc1"],
        result["acc5"],
        result["architecture"],
    )

    best = out / "checkpoints" / "best.json"
    weights = checkpoint.load(out / "checkpoints" / "scratch" / "bnps-checkpoint.pth", "scratch").weights
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, out / "official.pth.tar")
    stdout, _ = run("scratch.py", "--eval", *demo, "--checkpoint", out / "official.pth.tar", "--architecture", best)
    assert last_json(stdout) == again
    _, stderr = run("scratch.py", "--eval", *demo, "--architecture", ROOT / "architecture_final.json", code=2)
    assert "contradicts" in stderr and len(stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["supernet", "tester", "scratch"])
def test_a_run_leaves_settings_that_can_be_read_again(script, tmp_path):
    parse_args = importlib.import_module(script).parse_args
    args = parse_args(["--demo", "--seed", "3", "--no-mirror"])
    write_settings(tmp_path / "config.yml", script, vars(args))
    again = parse_args(["--config", str(tmp_path / "config.yml")])
    ignored = {"config", "demo", "data_dir", "out"}  # the paths are absolute now
    assert {k: v for k, v in vars(again).items() if k not in ignored} == {
        k: v for k, v in vars(args).items() if k not in ignored
    }


@pytest.mark.parametrize(
    "script", ["supernet.py", "tester.py --architecture x", "search.py", "scratch.py", "scratch.py --eval"]
)
def test_without_imagenet_one_line_says_so(script, tmp_path):
    words = (*script.split(), "--data-dir", "data/imagenet", "--out", tmp_path)  # relative to a folder without one
    stdout, stderr = run(*words, code=2, cwd=tmp_path)
    assert stdout == "" and len(stderr.splitlines()) == 1
    assert "data/imagenet/train" in stderr and "--demo" in stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "search.lock"]


@pytest.mark.parametrize(
    "words, message",
    [
        (("tester.py", "--demo", "--architecture", "x.json"), "no supernet in"),
        (("search.py", "--demo"), "no supernet in"),
        (("scratch.py", "--demo", "--eval"), "no network in"),
        (("supernet.py", "--demo", "--lr", "nan"), "--lr: 'nan' is not a number"),
        (("supernet.py", "--demo", "--batch-size", "0"), "--batch-size: '0' is not a whole number from 2"),
        (("supernet.py", "--demo", "--batch-size", "9000"), "--batch-size 9000"),
        (("supernet.py", "--demo", "--bat", "64"), "unrecognized arguments: --bat"),
        (("supernet.py", "--demo", "--val-resize", "20"), "--val-resize 20 is smaller"),
        (("supernet.py", "--demo", "--heldout-per-class", "1000"), "--heldout-per-class 1000"),
        (("supernet.py", "--config", "missing.yml"), "missing.yml: No such file"),
        (("scratch.py", "--demo", "--architecture", "missing.json"), "missing.json: No such file"),
    ],
)
def test_what_a_person_gets_wrong_is_one_line(words, message, tmp_path):
    stdout, stderr = run(*words, "--out", tmp_path, code=2)
    assert stdout == "" and len(stderr.splitlines()) == 1, stderr
    assert message in stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("supernet: {iterations: many}", "--iterations: 'many'"),
        ("supernet: {speed: 3}", "no setting 'speed'"),
        ("supernet: [1]", "'supernet' is not a section"),
        ("common: !!python/object/apply:os.system ['touch executed']", "not plain YAML"),
        ("supernet: {mirror: 3}", "mirror is 3, not true or false"),
    ],
)
def test_a_wrong_config_is_one_line(text, message, tmp_path):
    (tmp_path / "c.yml").write_text(text)
    _, stderr = run("supernet.py", "--config", tmp_path / "c.yml", "--out", tmp_path / "out", code=2, cwd=tmp_path)
    assert len(stderr.splitlines()) == 1 and "c.yml" in stderr and message in stderr
    assert not (tmp_path / "executed").exists()


def test_a_flag_that_contradicts_the_checkpoint_is_refused(out):
    architecture = ROOT / "architecture_final.json"
    words = ("tester.py", "--mode", "test", *SMALL, "--out", out, "--architecture", architecture)
    _, stderr = run(*words, "--input-size", 32, code=2)
    assert "--input-size 32 contradicts" in stderr
    _, stderr = run(*words[:4], "--heldout-per-class", 5, *words[6:], code=2)
    assert "--heldout-per-class 5 contradicts" in stderr


def test_official_weights_warn_that_the_search_images_were_seen(out, tmp_path):
    model, _ = checkpoint.load_supernet(None, out)
    official = tmp_path / "checkpoint-150000.pth.tar"
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, official)
    words = (
        "tester.py",
        "--mode",
        "test",
        *SMALL,
        "--out",
        tmp_path,
        "--architecture",
        ROOT / "architecture_final.json",
    )
    stdout, stderr = run(*words, "--checkpoint", official)
    assert "seen in training" in stderr and last_json(stdout)["n_images"] == 40


def test_scripts_run_from_anywhere(out, tmp_path):
    stdout, _ = run("tester.py", "--mode", "gen", "--out", pathlib.Path("here"), cwd=tmp_path)
    assert (tmp_path / "here" / "nni_auto_gen_search_space.json").exists() and "20 choice blocks" in stdout
