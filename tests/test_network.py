"""Both networks against reference_spos.py, an implementation that shares no line with them; the parts of both."""

import functools
import random

import pytest
import reference_spos
import torch
import torch.nn.functional as F
from conftest import real_images
from torch import nn

import blocks
import network
from space.search_space import SearchSpace
from utils import UserError

CLASSES = 10
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SMALL = SearchSpace(16, 5, 1, (2, 2), (1, 2), (8, 16), 4, 16)  # for tests where the size says nothing


def image_batches(n_batches, batch_size, px, dtype=torch.float32):
    """Batches (N, 3, px, px) of bundled images, resized, in [0, 255], and their labels; no image comes twice."""
    images, labels = real_images(n_batches * batch_size, px)
    return list(zip(images.to(dtype).split(batch_size), labels.split(batch_size)))


@functools.cache
def supernets(px, dtype):
    """(ours, the reference) with the same weights."""
    torch.manual_seed(0)
    ours = network.ShuffleNetV2OneShot(px, CLASSES).to(dtype)
    space = ours.space
    reference = reference_spos.Network(None, CLASSES, False, space.stem_stride, space.blocks[-1].out_size).to(dtype)
    reference.load_state_dict(ours.state_dict(), strict=True)
    return ours, reference


def candidates(n, space=None, seed=0):
    rng = random.Random(seed)
    return [(space or SearchSpace()).random_candidate(rng) for _ in range(n)]


def outcome(model, px, dtype, *path, batch_size=4):
    """What a model makes of the same images: logits, gradients and BN statistics of a training step, with dropout from
    the same seed, then logits in eval mode and the statistics after calibration on two other batches."""
    (images, labels), *calibration = image_batches(3, batch_size, px, dtype)
    model.train().zero_grad()
    set_batch_norm(model, momentum=0.1)
    torch.manual_seed(1)
    logits = model(images, *path)
    F.cross_entropy(logits, labels).backward()
    result = {"train logits": logits.detach()}
    result |= {f"gradient of {k}": v.grad for k, v in model.named_parameters() if v.grad is not None}
    result |= {f"after a step: {k}": v.clone() for k, v in model.state_dict().items() if "running" in k}
    set_batch_norm(model, momentum=None)  # the average over all batches
    with torch.no_grad():
        for batch, _ in calibration:
            model(batch, *path)
        result["eval logits"] = model.eval()(images, *path)
    return result | {f"calibrated: {k}": v.clone() for k, v in model.state_dict().items() if "running" in k}


def set_batch_norm(model, momentum):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = momentum


def difference(a, b):
    """Largest difference relative to the largest value."""
    assert torch.isfinite(b).all()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def assert_same(ours, reference, dtype):
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        tolerance = TOLERANCE[dtype]
        if "logits" in name:
            assert expected.abs().max() > 1e-2  # before calibration they are about 1e-6 and would prove nothing
        elif name.startswith("gradient") and dtype == torch.float32:
            tolerance *= 10  # they pass through 20 blocks twice
        assert difference(ours[name], expected) <= tolerance, name


# --- the same as the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("px, dtype", [(28, torch.float64), (32, torch.float32)], ids=str)
def test_the_supernet_equals_the_reference(px, dtype):
    ours, reference = supernets(px, dtype)
    for path in candidates(2, seed=px):
        assert_same(outcome(ours, px, dtype, path), outcome(reference, px, dtype, path), dtype)


def test_the_supernet_equals_the_reference_at_224_px():
    dtype, path = torch.float64, reference_spos.WINNER
    ours, reference = supernets(224, dtype)
    assert_same(*(outcome(m, 224, dtype, path, batch_size=2) for m in (ours, reference)), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_retrained_network_equals_the_reference(dtype):
    path = candidates(1, seed=5)[0]
    torch.manual_seed(0)
    reference = reference_spos.Network(path, CLASSES, True, stem_stride=1, last_size=2).to(dtype)
    for name, weight in reference.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, 0, weight.shape[1] ** -0.5)
        else:
            nn.init.normal_(weight, float(name.endswith("weight")), 0.1)
    ours = network.ShuffleNetV2(path, 32, CLASSES).to(dtype)
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert_same(outcome(ours, 32, dtype), outcome(reference, 32, dtype), dtype)


def test_a_path_of_the_supernet_equals_the_fixed_network():
    supernet, _ = supernets(32, torch.float32)
    path = candidates(1, seed=3)[0]
    fixed = network.ShuffleNetV2(path, 32, CLASSES, affine=False)
    fixed.load_state_dict(path_weights(supernet, path), strict=True)
    a, b = outcome(supernet, 32, torch.float32, path), outcome(fixed, 32, torch.float32)
    for name in ("train logits", "eval logits"):
        assert torch.equal(a[name], b[name])
    affine = network.ShuffleNetV2(path, 32, CLASSES)
    affine.load_state_dict(path_weights(supernet, path), strict=False)
    for name, bias in affine.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(bias)
    c = outcome(affine, 32, torch.float32)
    assert torch.equal(a["train logits"], c["train logits"]) and torch.equal(a["eval logits"], c["eval logits"])


def path_weights(supernet, path):
    """The supernet's state dict without the operations that the path doesn't choose."""
    weights = {}
    for name, tensor in supernet.state_dict().items():
        if name.startswith("features."):
            _, block, operation, rest = name.split(".", 3)
            if int(operation) != path[int(block)]:
                continue
            name = f"features.{block}.{rest}"
        weights[name] = tensor
    return weights


def test_operations_that_were_not_sampled_get_no_gradient():
    torch.manual_seed(0)
    model = network.ShuffleNetV2OneShot(space=SearchSpace.for_images(32, CLASSES))
    path = candidates(1)[0]
    images, labels = image_batches(1, 2, 32)[0]
    F.cross_entropy(model(images, path), labels).backward()
    for name, weight in model.named_parameters():
        parts = name.split(".")
        sampled = parts[0] != "features" or int(parts[2]) == path[int(parts[1])]
        assert (weight.grad is not None) == sampled, name
        assert not sampled or weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("path", [(0, 1), (-1,) * SMALL.n_blocks, (9,) * SMALL.n_blocks, torch.zeros(SMALL.n_blocks)])
def test_what_is_no_candidate_is_no_path(path):
    model = network.ShuffleNetV2OneShot(space=SMALL)
    with pytest.raises(UserError, match="architecture"):
        model(torch.zeros(2, 3, 16, 16), path)


# --- parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_channel_shuffle_is_torchs_own_in_the_layout_of_the_input(layout):
    x = torch.randn(2, 6, 3, 3, dtype=torch.double).to(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(blocks.channel_shuffle, x)
    (gradient,) = torch.autograd.grad(sum((part * part).sum() for part in blocks.channel_shuffle(x)), x)
    assert torch.equal(gradient, 2 * x) and gradient.is_contiguous(memory_format=layout)


def test_channel_shuffle_is_a_permutation_made_of_views():
    x = torch.arange(2 * 8 * 3 * 3.0).reshape(2, 8, 3, 3)
    even, odd = blocks.channel_shuffle(x)
    assert torch.equal(even, x[:, [0, 2, 4, 6]]) and torch.equal(odd, x[:, [1, 3, 5, 7]])
    assert sorted(torch.cat((even, odd)).flatten().tolist()) == x.flatten().tolist()
    storage = x.untyped_storage().data_ptr()
    assert even.untyped_storage().data_ptr() == odd.untyped_storage().data_ptr() == storage
    for mine, theirs in zip((even, odd), reference_spos.shuffle(x)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("operation", SearchSpace().operations)
@pytest.mark.parametrize("strides, size", [((2, 2), 16), ((2, 2), 15), ((1, 2), 9)])
def test_blocks_have_the_shapes_of_the_space_and_gradients_everywhere(operation, strides, size):
    space = SearchSpace(size, 5, 1, strides, (2, 2), (8, 16), 4, 16)
    for shape in space.blocks:
        torch.manual_seed(0)
        block = network.build_block(operation, shape)
        x = torch.randn(3, shape.in_channels, shape.in_size, shape.in_size, requires_grad=True)
        y = block(x)
        assert y.shape == (3, shape.out_channels, shape.out_size, shape.out_size)
        (y * torch.randn_like(y)).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in block.parameters() if p.ndim > 1)
        assert (x.grad.abs().sum(dim=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize("affine", [False, True])
def test_initial_weights(affine):
    """N(0, 0.01) for stem and classifier, N(0, 1 / weight.shape[1]) for the other convolutions; BN 1 and 1e-4."""
    torch.manual_seed(0)
    model = network.ShuffleNetV2OneShot() if not affine else network.ShuffleNetV2(reference_spos.WINNER)
    depthwise = 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach().double()
            sd = 0.01 if name in ("first_conv.0", "classifier.0") else 1 / weight.shape[1]
            depthwise += sd == 1
            assert abs(weight.mean()) < 5 * sd / weight.numel() ** 0.5, name
            assert abs(weight.std() / sd - 1) < 5 / (2 * weight.numel()) ** 0.5, name
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert module.affine == affine and module.momentum == 0.1 and module.eps == 1e-5
            if affine:
                assert (module.weight == 1).all() and (module.bias == 1e-4).all()
    assert depthwise >= 20


def test_parameters_are_as_published():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    with torch.device("meta"):
        assert count(network.ShuffleNetV2OneShot()) == 8_388_176
        assert (
            count(network.ShuffleNetV2(reference_spos.WINNER))
            == 3_558_464
            == SearchSpace().params(reference_spos.WINNER)
        )
        for path in candidates(3):
            assert count(network.ShuffleNetV2(path, 64, 7)) == SearchSpace.for_images(64, 7).params(path)


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_computes_in_the_numbers_that_are_asked_for(amp, dtype):
    with network.autocast(torch.device("cpu"), amp):
        assert F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1)).dtype == dtype
