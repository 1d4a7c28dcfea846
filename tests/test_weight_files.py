"""Files of weights: official ones load strictly, what is damaged or hostile is refused."""

import argparse
import io
import pathlib
import pickle
import random

import numpy as np
import pytest
import reference_spos
import torch
from test_network import CLASSES, SMALL, difference, image_batches, supernets

import network
from space import weight_files
from utils import UserError


def weights_in(path):
    return weight_files.parse_state_dict(weight_files.load_file(path), path)


def official_file(path, state_dict, **kwargs):
    torch.save({"state_dict": {f"module.{k}": v for k, v in state_dict.items()}}, path, **kwargs)
    return path


@pytest.mark.slow
def test_an_official_supernet_file_loads_strictly(tmp_path):
    _, reference = supernets(32, torch.float32)
    path = official_file(
        tmp_path / "checkpoint-150000.pth.tar", reference.state_dict(), _use_new_zipfile_serialization=False
    )
    with torch.device("meta"):
        model = network.ShuffleNetV2OneShot(32, CLASSES)
    weights = weights_in(path)
    weight_files.load_weights(model, weights, path)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
def test_an_official_retrained_file_loads_strictly(tmp_path, zipped):
    """The official files are of torch 1.x, whose format was not yet a zip archive."""
    torch.manual_seed(0)
    reference = reference_spos.Network(reference_spos.WINNER, 1000, True).eval()
    path = official_file(tmp_path / "retrained.pth.tar", reference.state_dict(), _use_new_zipfile_serialization=zipped)
    model = network.ShuffleNetV2(reference_spos.WINNER).eval()
    weight_files.load_weights(model, weights_in(path), path)
    images, _ = image_batches(1, 1, 224)[0]
    with torch.no_grad():
        assert difference(model(images), reference(images)) < 1e-5


def small_weights():
    torch.manual_seed(0)
    return network.ShuffleNetV2OneShot(space=SMALL).state_dict()


def test_bare_and_wrapped_state_dicts_are_the_same(tmp_path):
    weights = dict(small_weights())
    prefixed = {f"module.{k}": v for k, v in weights.items()}
    for content in (
        weights,
        prefixed,
        {"model": weights},
        {"state_dict": weights},
        {"state_dict": prefixed, "epoch": 3},
    ):
        torch.save(content, tmp_path / "file")
        check_same(weights_in(tmp_path / "file"), weights)


def check_same(found, weights):
    assert found.keys() == weights.keys() and all(torch.equal(v, weights[k]) for k, v in found.items())


@pytest.mark.parametrize(
    "wrapped",
    [
        *("_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "module.module.{}", "_orig_mod._orig_mod.{}"),
        lambda name: name.replace(".", "._orig_mod.", 1),  # a part that was compiled alone
    ],
)
def test_names_that_ddp_and_compile_gave_are_those_of_the_model(wrapped):
    weights, name_in_file = small_weights(), wrapped.format if isinstance(wrapped, str) else wrapped
    file = {name_in_file(name): tensor for name, tensor in weights.items()}
    assert not file.keys() & weights.keys()
    check_same(weight_files.parse_state_dict(file, "FILE"), weights)
    with pytest.raises(UserError, match="FILE: holds an entry twice"):
        weight_files.parse_state_dict(file | weights, "FILE")


class Bomb:
    """Unpickled by `pickle.load`, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_file_that_would_execute_code_is_refused_and_nothing_runs(tmp_path):
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # so the bomb works
    mark.unlink()
    torch.save({"state_dict": {"x": Bomb(mark)}}, tmp_path / "zip.pth")
    torch.save({"state_dict": {"x": Bomb(mark)}}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Bomb(mark)))
    for name in ("zip.pth", "legacy.pth", "pickle.pth"):
        with pytest.raises(UserError, match=f"{name}: not a whole checkpoint of plain tensors"):
            weights_in(tmp_path / name)
    assert not mark.exists()


BESIDE = {
    "best": np.float64(73.5), "epoch": np.int64(3), "small": np.float16(0.5), "done": np.bool_(True),
    "name": np.str_("a"), "none": np.zeros((0, 3)), "alone": np.array(7),
    "history": np.arange(6.0).reshape(2, 3), "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "swapped": np.array([1, 2], ">i4"), "words": np.array(["a", "bc"]), "mixed": np.array([1, None, "x"], object),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
def test_numbers_and_arrays_of_numpy_beside_weights_are_read(tmp_path, zipped):
    path = official_file(tmp_path / "file", small_weights(), _use_new_zipfile_serialization=zipped)
    torch.save(torch.load(path) | BESIDE, path, _use_new_zipfile_serialization=zipped)
    versions = [path.read_bytes()]
    if not zipped:  # the names of NumPy 1
        versions.append(versions[0].replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
        assert versions[0] != versions[1]
    for data in versions:
        path.write_bytes(data)
        content = weight_files.load_file(path)
        check_same(weight_files.parse_state_dict(content, path), small_weights())
        for name, value in BESIDE.items():
            assert np.array_equal(content[name], value) and content[name].dtype == value.dtype.newbyteorder("="), name
            assert np.shape(content[name]) == np.shape(value)


class Reduced:
    """Is pickled as the call of a function, and a state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def array(shape, dtype, values):
    make, arguments, _ = np.zeros(0).__reduce__()
    return Reduced(make, arguments, (1, shape, dtype, False, values))


FIELDS = (3, "|", None, ("x",), {"x": (np.dtype(object), 0)}, 8, 8, 0)  # an object, without the flag that says so


@pytest.mark.parametrize(
    "value",
    [
        array((2,), np.dtype(object), b"\1" * 16),
        array((1,), Reduced(np.dtype, ("V8",), FIELDS), b"\1" * 8),
        array((2**40,), np.dtype("f8"), b""),
        array((2**32, 2**32), np.dtype("f8"), b""),
        array((-1, -1), np.dtype("f8"), b"\1" * 8),
        array((2**40,), np.dtype("U0"), b""),
        array((1,), np.dtype("f8"), [1.0]),
        Reduced(np.float64(1).__reduce__()[0], (np.dtype(object), b"\1" * 8)),
        Reduced(np.float64(1).__reduce__()[0], (np.dtype("f8"), b"")),
    ],
)
def test_bytes_do_not_become_pointers(tmp_path, value):
    torch.save({"state_dict": small_weights(), "x": value}, tmp_path / "file")
    with pytest.raises(UserError, match="file: not a whole checkpoint") as error:
        weight_files.load_file(tmp_path / "file")
    assert "\n" not in str(error.value)


def test_numpys_own_functions_are_not_called(tmp_path):
    """Of their arguments only values count: no memory is given out for them."""
    value = Reduced(np.ndarray, ((2**50,), "O", b"\1" * 8))
    torch.save({"state_dict": small_weights(), "x": value}, tmp_path / "file")
    assert weight_files.load_file(tmp_path / "file")["x"].shape == (0,)


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
def test_types_that_cannot_be_read_are_named_and_the_way_out_works(tmp_path, monkeypatch, zipped):
    content = {"state_dict": small_weights(), "args": argparse.Namespace(lr=0.5), "where": pathlib.PurePosixPath("x")}
    path = tmp_path / "it's.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"not a whole checkpoint of plain tensors \(it holds argparse\.Namespace"
    ) as error:
        weight_files.load_file(path)
    line = str(error.value)
    assert line.isprintable() and "remove" not in line and ("pathlib.PurePosixPath" in line) == zipped
    monkeypatch.chdir(tmp_path)
    exec(line.split("lines of Python: ")[1], {})
    check_same(weights_in("weights.pth"), small_weights())


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"state_dict": {"x": 1}}, {"epoch": 3},
torch.zeros(2), None,
                                     {"x": torch.zeros(2).to_sparse()}, {"x": torch.zeros(2,
                                     device="meta")}])  # fmt: skip
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "file")
    with pytest.raises(UserError, match="file: holds no state dict"):
        weights_in(tmp_path / "file")


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
def test_damaged_files_are_refused(tmp_path, zipped):
    """Cut off anywhere, or with bytes overwritten, a file either loads or is refused with one line."""
    whole = io.BytesIO()
    torch.save({"state_dict": small_weights()}, whole, _use_new_zipfile_serialization=zipped)
    whole = whole.getvalue()
    rng, path = random.Random(0), tmp_path / "damaged.pth"
    for size in [0, 1, 10, *(rng.randrange(len(whole)) for _ in range(40))]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"damaged\.pth: ") as error:
            weight_files.load_file(path)
        assert "\n" not in str(error.value)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
            damaged[rng.randrange(2000)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            weights_in(path)
        except UserError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("path", ["no/such/file", "."])
def test_a_missing_file_and_a_folder_are_refused(path):
    with pytest.raises(UserError, match="can't be read"):
        weight_files.load_file(path)


def test_weights_of_another_model_are_refused():
    supernet, fixed = network.ShuffleNetV2OneShot(space=SMALL), network.ShuffleNetV2((0, 1, 2), space=SMALL)
    with pytest.raises(
        UserError, match=r"FILE: entry '.*' is (missing|of another model); the model is ShuffleNetV2, 5 classes"
    ):
        weight_files.load_weights(fixed, supernet.state_dict(), "FILE")
    with pytest.raises(
        UserError, match=r"FILE: entry 'classifier.0.weight' has shape \(6, 16\), the model needs \(5, 16\)"
    ):
        weight_files.load_weights(supernet, small_weights() | {"classifier.0.weight": torch.zeros(6, 16)}, "FILE")
    with pytest.raises(UserError, match=r"FILE: entry 'conv_last.0.weight' is missing"):
        weight_files.load_weights(
            supernet, {k: v for k, v in small_weights().items() if k != "conv_last.0.weight"}, "FILE"
        )
    named = {f"net.{name}": tensor for name, tensor in fixed.state_dict().items()}
    n = 2 * len([name for name in named if not name.endswith("num_batches_tracked")])
    n += len(named) - n // 2  # counts are not needed, but those of another name have no place
    like = f"'classifier.0.weight' is missing; .*, the file has 'net.classifier.0.weight' instead; {n} names differ"
    with pytest.raises(UserError, match=like):
        weight_files.load_weights(fixed, named, "FILE")
    named = {f"a.{name}": tensor for name, tensor in fixed.state_dict().items()}
    like = "'a.classifier.0.weight' is of another model; .*, the model has 'classifier.0.weight' instead"
    with pytest.raises(UserError, match=like):
        weight_files.load_weights(fixed, named, "FILE")
    with pytest.raises(UserError, match=r"FILE: entry 'x' is of another model; .* 5 classes; 1 names differ"):
        weight_files.load_weights(fixed, fixed.state_dict() | {"x": torch.zeros(1)}, "FILE")
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    with pytest.raises(UserError):
        weight_files.load_weights(supernet, fixed.state_dict(), "FILE")
    assert all(torch.equal(v, before[k]) for k, v in supernet.state_dict().items())


@pytest.mark.parametrize("fixed", [False, True])
def test_weights_without_the_counts_of_batches_are_read(fixed):
    """As old versions of torch wrote them, and as conversions do. Other statistics of BN have to be there."""

    def model():
        return network.ShuffleNetV2((0, 1, 2), space=SMALL) if fixed else network.ShuffleNetV2OneShot(space=SMALL)

    weights = {k: v + 1 for k, v in model().state_dict().items() if not k.endswith("num_batches_tracked")}
    with torch.device("meta"):
        loaded = model()
    weight_files.load_weights(loaded, weights, "FILE")
    found = loaded.state_dict()
    assert len(found) > len(weights) and all(torch.equal(found[k], v) for k, v in weights.items())
    assert not any(found[k].any() for k in found.keys() - weights.keys())
    needed = [name for name in weights if name.startswith("first_conv.")]
    assert {"first_conv.0.weight", "first_conv.1.running_mean", "first_conv.1.running_var"} <= set(needed)
    for lost in needed:
        with pytest.raises(UserError, match=f"FILE: entry '{lost}' is missing; .*; 1 names differ"):
            weight_files.load_weights(model(), {k: v for k, v in weights.items() if k != lost}, "FILE")
