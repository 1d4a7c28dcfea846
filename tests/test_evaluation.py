"""BN recalibration and exact accuracy."""
import pytest
import torch

from evaluation import accuracy, evaluate, recalibrate_bn
from network import ShuffleNetV2OneShot
from search_space import SearchSpace

SPACE = SearchSpace(input_size=32, n_classes=7, stem_stride=1)
PATHS = [(0, 1, 2, 3) * 5, (3, 2, 1, 0) * 5]


def batches(n, size, seed=0, ragged=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * n + [ragged] * bool(ragged)
    return [(torch.rand(s, 3, 32, 32, generator=generator) * 255, torch.randint(0, 7, (s,), generator=generator)) for s in sizes]


@pytest.fixture
def supernet():
    torch.manual_seed(0)
    return ShuffleNetV2OneShot(space=SPACE)


def stem_statistics(supernet, data):
    """Per batch: mean (C,) and unbiased variance (C,) of what the stem's BN sees."""
    with torch.no_grad():
        outputs = [supernet.first_conv[0](x) for x, _ in data]
    return [o.mean((0, 2, 3)) for o in outputs], [o.var((0, 2, 3)) for o in outputs]


def test_average_is_the_plain_mean_over_batches(supernet):
    data = batches(5, 8)
    recalibrate_bn(supernet, lambda x: supernet(x, PATHS[0]), data, "average")
    means, variances = stem_statistics(supernet, data)
    norm = supernet.first_conv[1]
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))


def test_ema_is_the_official_exponential_average(supernet):
    data = batches(5, 8)
    recalibrate_bn(supernet, lambda x: supernet(x, PATHS[0]), data)
    mean, variance = 0, 1
    for m, v in zip(*stem_statistics(supernet, data)):
        mean, variance = 0.9 * mean + 0.1 * m, 0.9 * variance + 0.1 * v
    norm = supernet.first_conv[1]
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.1 and not norm.training and not supernet.dropout.training


def test_a_result_does_not_depend_on_what_was_evaluated_before(supernet):
    calibration, validation = batches(3, 8), batches(2, 16, 1, ragged=3)

    def results(candidates):
        return {tuple(r["architecture"]): (r["acc1"], r["acc5"]) for r in evaluate(supernet, candidates, calibration, validation)}

    for norm in supernet.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.fill_(100.0)
    both = results(PATHS)
    assert both == results(PATHS[::-1]) == results(PATHS[:1]) | results(PATHS[1:])


def test_a_result_says_what_was_measured(supernet):
    (result,) = evaluate(supernet, PATHS[:1], batches(2, 8), batches(2, 16, 1, ragged=3))
    assert result["architecture"] == list(PATHS[0]) and result["flops"] == SPACE.flops(PATHS[0])
    assert result["n_images"] == 35 and 0 <= result["acc1"] <= result["acc5"] <= 100 and result["seconds"] >= 0


def test_recalibration_decides_the_accuracy(supernet):
    """With the initial statistics the last layers see nothing like their input; recalibrated features differ."""
    data = batches(4, 16)
    supernet.eval()
    with torch.no_grad():
        before = supernet(data[0][0], PATHS[0])
    recalibrate_bn(supernet, lambda x: supernet(x, PATHS[0]), data, "average")
    with torch.no_grad():
        after = supernet(data[0][0], PATHS[0])
    assert after.std() > 1000 * before.std()


def test_accuracy_is_exact_over_ragged_batches():
    logits = torch.randn(23, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 7, (23,), generator=torch.Generator().manual_seed(1))
    order = logits.argsort(1, descending=True)
    top1 = sum(int(row[0] == label) for row, label in zip(order, labels)) / 23 * 100
    top5 = sum(int(label in row[:5]) for row, label in zip(order, labels)) / 23 * 100
    for size in (23, 8, 1):
        data = zip(logits.split(size), labels.split(size))
        assert accuracy(lambda x: x, data) == (pytest.approx(top1, abs=1e-9), pytest.approx(top5, abs=1e-9), 23)


def test_top5_of_fewer_than_five_classes_is_all():
    data = [(torch.eye(3), torch.tensor([0, 2, 1]))]
    assert accuracy(lambda x: x, data) == (pytest.approx(100 / 3), 100.0, 3)
