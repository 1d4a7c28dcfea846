"""Files of weights: official ones load strictly, what is damaged or hostile is refused."""

import io
import pathlib
import pickle
import random

import pytest
import reference_spos
import torch
from test_network import CLASSES, SMALL, difference, image_batches, supernets

import network
from training import checkpoint
from utils import UserError


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
    weights = checkpoint.load_and_parse_state_dict(path)
    checkpoint.load_weights(model, weights, path)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
def test_an_official_retrained_file_loads_strictly(tmp_path, zipped):
    """The official files are of torch 1.x, whose format was not yet a zip archive."""
    torch.manual_seed(0)
    reference = reference_spos.Network(reference_spos.WINNER, 1000, True).eval()
    path = official_file(tmp_path / "retrained.pth.tar", reference.state_dict(), _use_new_zipfile_serialization=zipped)
    model = network.ShuffleNetV2(reference_spos.WINNER).eval()
    checkpoint.load_weights(model, checkpoint.load_and_parse_state_dict(path), path)
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
        found = checkpoint.load_and_parse_state_dict(tmp_path / "file")
        assert found.keys() == weights.keys() and all(torch.equal(v, weights[k]) for k, v in found.items())


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
            checkpoint.load_and_parse_state_dict(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"state_dict": {"x": 1}}, {"epoch": 3},
torch.zeros(2), None,
                                     {"x": torch.zeros(2).to_sparse()}, {"x": torch.zeros(2,
                                     device="meta")}])  # fmt: skip
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "file")
    with pytest.raises(UserError, match="file: holds no state dict"):
        checkpoint.load_and_parse_state_dict(tmp_path / "file")


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
            checkpoint.load_file(path)
        assert "\n" not in str(error.value)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
            damaged[rng.randrange(2000)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            checkpoint.load_and_parse_state_dict(path)
        except UserError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("path", ["no/such/file", "."])
def test_a_missing_file_and_a_folder_are_refused(path):
    with pytest.raises(UserError, match="can't be read"):
        checkpoint.load_file(path)


def test_weights_of_another_model_are_refused():
    supernet, fixed = network.ShuffleNetV2OneShot(space=SMALL), network.ShuffleNetV2((0, 1, 2), space=SMALL)
    with pytest.raises(
        UserError, match=r"FILE: entry '.*' is (missing|of another model); the model is ShuffleNetV2, 5 classes"
    ):
        checkpoint.load_weights(fixed, supernet.state_dict(), "FILE")
    with pytest.raises(
        UserError, match=r"FILE: entry 'classifier.0.weight' has shape \(6, 16\), the model needs \(5, 16\)"
    ):
        checkpoint.load_weights(supernet, small_weights() | {"classifier.0.weight": torch.zeros(6, 16)}, "FILE")
    with pytest.raises(UserError, match=r"FILE: entry 'conv_last.0.weight' is missing"):
        checkpoint.load_weights(
            supernet, {k: v for k, v in small_weights().items() if k != "conv_last.0.weight"}, "FILE"
        )
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    with pytest.raises(UserError):
        checkpoint.load_weights(supernet, fixed.state_dict(), "FILE")
    assert all(torch.equal(v, before[k]) for k, v in supernet.state_dict().items())
