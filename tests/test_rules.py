"""Training rules of one's own: what the step does for them, resuming, the ranks, and the hashes of own files."""

import collections
import dataclasses
import functools
import json
import types

import pytest
import torch
from conftest import ROOT, forget, run
from test_distributed import outcomes
from test_training import SPACE, Images, assert_same_end, settings

from network import ShuffleNetV2, ShuffleNetV2OneShot
from space import own, search_space
from space.sampler import PathSampler
from space.weight_files import load
from training.checkpoint import check_settings, newest
from training.loop import train
from training.run import TrainingRun, contents_of, described
from training.step import Step, single_path
from utils import UserError

RULES = str(ROOT / "examples" / "rules.py")
CONTENTS = contents_of(SPACE, None, ["a", "b", "c"])


@pytest.fixture(autouse=True)
def rules():
    own.load(RULES)
    yield
    forget()


def supernet(dtype=torch.float32):
    torch.manual_seed(0)
    return ShuffleNetV2OneShot(space=SPACE).to(dtype)


def batch(n=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(n, 3, 16, 16, generator=generator).to(dtype) * 255, torch.arange(n) % 3


class Stopping(Images):
    """Fails after `n` batches of all runs."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def batches(self, plan):
        for one in super().batches(plan):
            if self.taken > self.n:
                raise UserError("stopped")
            yield one


def trained(folder, images=None, sampler=None, **given):
    torch.manual_seed(0)
    run_ = TrainingRun(folder, "supernet", CONTENTS)
    train(ShuffleNetV2OneShot(space=SPACE), images or Images(), settings(**given), sampler or PathSampler(SPACE, 0),
          run=run_)  # fmt: skip


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_strictly_fair_paths_take_every_operation_once():
    model, (images, labels) = supernet(), batch()
    Step(model, settings(rule="fair")).train_one_step(1, images, labels)
    assert len(gradients(model)) == len(list(model.parameters()))
    paths = []

    def noted(step, candidate, images, labels):
        yield from own.REGISTRIES["rule"]["fair"](step, candidate, images, labels)

    step = Step(model, settings(), rule=noted)
    forward = step.forward
    step.forward = lambda path, images: paths.append(path) or forward(path, images)
    step.train_one_step(1, images, labels)
    assert all(sorted(column) == [0, 1, 2, 3] for column in zip(*paths)) and len(paths) == 4


def test_a_sandwich_teaches_by_the_largest():
    model, other, (images, labels) = supernet(torch.double), supernet(torch.double), batch(dtype=torch.double)
    model.dropout.p = other.dropout.p = 0.0
    step = Step(model, settings(rule="sandwich", lr=0.0))
    _, last = step.train_one_step(1, images, labels)
    found = gradients(model)
    plain, rng = Step(other, settings(lr=0.0)), step.rng
    paths = [SPACE.largest(), SPACE.smallest(), SPACE.random_candidate(rng), SPACE.random_candidate(rng)]
    logits = [plain.forward(path, images) for path in paths]
    losses = [plain.criterion(logits[0], labels)]
    taught = logits[0].detach().softmax(1)
    losses += [torch.nn.functional.cross_entropy(other_logits, taught) for other_logits in logits[1:]]
    sum(losses).backward()
    assert torch.equal(last, logits[-1].detach())
    expected = gradients(other)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_two_supernets_share_the_operations_of_the_first_block():
    images, labels = batch()
    for half, expected in enumerate(({0, 1}, {2, 3})):
        step, paths = Step(supernet(), settings(rule=f"half-{half}")), []
        forward = step.forward
        step.forward = lambda path, images: paths.append(path) or forward(path, images)  # noqa: B023
        candidates = [SPACE.uniform_candidate(number % 4) for number in range(1, 13)]
        for number, candidate in enumerate(candidates, 1):
            step.train_one_step(number, images, labels, candidate)
        assert {path[0] for path in paths} == expected and [path[1:] for path in paths] == [c[1:] for c in candidates]
        trains = own.REGISTRIES["rule"][f"half-{half}"].trains
        assert {c for c in range(4) if trains(SPACE, (c, 0))} == expected


@pytest.mark.parametrize("rule", ["fair", "sandwich"])
def test_micro_batches_keep_the_statistics_of_the_first_and_average_the_gradients(rule):
    """In double precision, with dropout off: the gradients are the mean of those of the micro-batches alone."""
    whole, images, labels = supernet(torch.double), *batch(8, torch.double)
    whole.dropout.p = 0.0
    Step(whole, settings(rule=rule, lr=0.0, micro_batch=4)).train_one_step(3, images, labels)
    parts = []
    for half in (slice(0, 4), slice(4, 8)):
        model = supernet(torch.double)
        model.dropout.p = 0.0
        Step(model, settings(rule=rule, lr=0.0)).train_one_step(3, images[half], labels[half])
        parts.append((gradients(model), dict(model.named_buffers())))
    (a, buffers), (b, _) = parts
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradient, (a[name] + b[name]) / 2, rtol=1e-9, atol=1e-14, msg=name)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in whole.named_buffers())


@pytest.mark.parametrize("rule", ["fair", "sandwich"])
def test_a_rule_resumes_to_the_bit_and_with_no_other_rule(tmp_path, rule):
    given = {"iterations": 8, "save_every": 5, "micro_batch": 4, "rule": rule}
    trained(tmp_path / "whole", **given)
    with pytest.raises(UserError, match="stopped"):
        trained(tmp_path / "parts", Stopping(5), **given)
    trained(tmp_path / "parts", **given)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    for other, text in (("spos", rf"--rule spos \(was {rule}\)"), ("fair", r"--rule fair \(was sandwich\)")):
        if other != rule:
            with pytest.raises(UserError, match=text):
                trained(tmp_path / "parts", iterations=9, rule=other)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lr": 0.2}, r"--lr 0.2 \(was 0.5\)"),
        ({"iterations": 5}, r"--iterations 5 \(was 4\)"),
        ({"seed": 3}, r"--seed 3 \(was 0\)"),
        ({"sampler": lambda step: (0, 0, 0, 0)}, r"sampler .*<lambda> \(\w+\) \(was PathSampler\(seed 0, width_warmup"),
        (
            {"make_optimizer": lambda groups, training: torch.optim.AdamW(groups)},
            r"optimizer .*<lambda>.* \(was None",
        ),
        ({"rule": lambda *given: single_path(*given)}, r"--rule .*<lambda> \(was spos\)"),
    ],
)
def test_a_run_in_python_is_not_resumed_with_other_settings(tmp_path, changes, text):
    def go(iterations=4, seed=0, sampler=None, **how):
        given = {name: how.pop(name) for name in ("lr",) if name in how}
        sampler = sampler or PathSampler(SPACE, 0)
        run_ = TrainingRun(tmp_path, "supernet", CONTENTS)
        train(supernet(), Images(), settings(iterations=iterations, **given), sampler, run=run_, seed=seed, **how)

    go()
    go()  # finished: nothing to do, and not its own lock
    with pytest.raises(UserError, match=text):
        go(**changes)
    lines = (tmp_path / "run.log").read_text()
    assert "versions: python" in lines and "iterations of 8 images" in lines
    kept = (tmp_path / "config.yml").read_text()
    assert all(word in kept for word in ("rule: spos", "PathSampler(seed 0", "iterations: 4", "seed: 0"))


def test_what_differs_is_told_apart_and_what_is_equal_is_not(tmp_path):
    """Objects, partials, closures, methods and subclasses; the same run object twice."""

    class Rule:
        def __init__(self, scale):
            self.scale = scale

        def __repr__(self):
            return f"Rule({self.scale})"

        def __call__(self, step, candidate, images, labels):
            yield from single_path(step, candidate, images, labels)

        def other(self, *given):
            return self(*given)

    class Sub(PathSampler):
        pass

    def closure(n):
        return lambda step: (n, 0, 0, 0)

    partial = functools.partial
    things = [Rule(1), Rule(2), partial(closure, n=1), partial(closure, n=2), closure(1), closure(2), Rule(1).other,
              PathSampler(SPACE, 0), Sub(SPACE, 0), PathSampler(SPACE, 1)]  # fmt: skip
    texts = [described(thing) for thing in things]
    assert len(set(texts)) == len(texts) and "0x" not in "".join(texts)
    assert described(Rule(1)) == texts[0] and described(PathSampler(SPACE, 0).candidate) == texts[7]
    run_ = TrainingRun(tmp_path / "lr0.1", "supernet", CONTENTS)
    train(supernet(), Images(), settings(iterations=2), PathSampler(SPACE, 0), run=run_, rule=Rule(1))
    with pytest.raises(UserError, match=r"--lr 0.1 \(was 0.5\)"):
        train(supernet(), Images(), settings(iterations=2, lr=0.1), PathSampler(SPACE, 0), run=run_, rule=Rule(1))
    with pytest.raises(UserError, match="code of the rule"):
        train(supernet(), Images(), settings(iterations=2), PathSampler(SPACE, 0), run=run_, rule=Rule(2))
    assert (tmp_path / "lr0.1.lock").exists()
    with pytest.raises(UserError, match="contents has no classes"):
        train(supernet(), Images(), settings(iterations=2), PathSampler(SPACE, 0), run=TrainingRun(tmp_path / "b"))


def test_a_folder_of_before_without_settings_resumes_with_a_warning(tmp_path, caplog):
    trained(tmp_path, iterations=2)
    path = newest(tmp_path)
    content = load(path, "supernet").content
    torch.save(content | {"settings": {}}, path)
    trained(tmp_path, iterations=3, lr=0.1)
    assert caplog.text.count("has no settings to compare") == 1


def test_an_optimizer_and_a_schedule_of_ones_own(tmp_path):
    def adamw(groups, training):
        return torch.optim.AdamW(groups, lr=training.lr)

    model, rates = supernet(), []
    step = Step(model, settings(iterations=4, lr=0.01), make_optimizer=adamw, learning_rate=lambda n, training: 0.1 / n)
    assert [group["weight_decay"] for group in step.optimizer.param_groups] == [4e-5]
    for n in (1, 2):
        step.train_one_step(n, *batch(), (0, 1, 2, 3))
        rates.append(step.optimizer.param_groups[0]["lr"])
    assert rates == [0.1, 0.05]
    train(supernet(), Images(), settings(iterations=4), PathSampler(SPACE, 0), make_optimizer=adamw)

    def two_rates(groups, training):
        return torch.optim.SGD([groups[0] | {"lr": 0.1}, {"params": [torch.zeros(1)], "lr": 9.0}])

    with pytest.raises(UserError, match="groups different lr"):
        Step(supernet(), settings(), make_optimizer=two_rates)


def test_soft_labels_count_by_their_largest_entry(caplog):
    class Mixed(Images):
        def batches(self, plan):
            for images, labels in super().batches(plan):
                soft = torch.nn.functional.one_hot(labels, 3).float()
                yield images, 0.9 * soft + 0.1 * soft.roll(1, 0)

    hard = train(supernet(), Images(), settings(iterations=3), PathSampler(SPACE, 0))
    soft = train(supernet(), Mixed(), settings(iterations=3), PathSampler(SPACE, 0))
    assert soft["train/loss"] != hard["train/loss"] and 0 <= soft["train/acc1"] <= 100


def test_a_loss_that_is_not_finite_shows_whichever_path_it_is_of():
    def broken(step, candidate, images, labels):
        logits = step.forward(candidate, images)
        yield logits.sum() * float("nan"), logits
        yield from single_path(step, candidate, images, labels)

    with pytest.raises(UserError, match=r"loss of step 1 is not finite .*path \["):
        train(supernet(), Images(), settings(iterations=2), PathSampler(SPACE, 0), rule=broken)
    with pytest.raises(UserError, match="write yield, not return"):
        train(supernet(), Images(), settings(iterations=2), PathSampler(SPACE, 0), rule=lambda *given: (1, 2))
    with pytest.raises(UserError, match="yields no loss"):
        train(supernet(), Images(), settings(iterations=2), PathSampler(SPACE, 0), rule=lambda *given: iter(()))
    with pytest.raises(UserError, match=r"--rule other: is none of spos.*--own"):
        train(supernet(), Images(), settings(iterations=2, rule="other"), PathSampler(SPACE, 0))


def test_a_sampler_with_a_state_is_in_the_checkpoint(tmp_path):
    class Greedy:
        """Takes the candidate with the lowest loss so far, every other step."""

        def __init__(self):
            self.best, self.asked = [9.0, (0, 0, 0, 0)], []

        def __repr__(self):
            return "Greedy()"

        def candidate(self, step):
            self.asked.append(step)
            return tuple(self.best[1]) if step % 2 else PathSampler(SPACE, 0).candidate(step)

        def after_step(self, step, candidate, loss):
            self.best = min(self.best, [loss, list(candidate)], key=lambda pair: pair[0])

        def state_dict(self):
            return {"best": self.best}

        def load_state_dict(self, state):
            self.best = state["best"]

    whole, stopped, resumed = Greedy(), Greedy(), Greedy()
    trained(tmp_path / "whole", sampler=whole, iterations=60)
    with pytest.raises(UserError, match="stopped"):
        trained(tmp_path / "parts", Stopping(33), stopped, iterations=60)
    trained(tmp_path / "parts", sampler=resumed, iterations=60)
    assert all(len(sampler.asked) == len(set(sampler.asked)) for sampler in (whole, stopped, resumed))
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert whole.best == resumed.best
    whole.state_dict = lambda: {"best": collections.deque()}
    with pytest.raises(UserError, match=r"holds collections\.deque"):
        run_ = TrainingRun(tmp_path / "deque", "supernet", CONTENTS)
        train(supernet(), Images(), settings(iterations=2), whole, run=run_)


def test_a_stand_alone_network_is_trained_by_a_rule_too():
    """Distillation from a teacher, with micro-batches."""
    teacher = ShuffleNetV2((0, 1, 2, 3), space=SPACE).eval()

    def distilled(step, candidate, images, labels):
        with torch.no_grad():
            taught = teacher(images).softmax(1)
        logits = step.forward(candidate, images)
        yield torch.nn.functional.cross_entropy(logits, taught), logits

    network = ShuffleNetV2((0, 0, 0, 0), space=SPACE)
    metrics = train(network, Images(), settings(iterations=3, micro_batch=4), rule=distilled)
    assert 0 < metrics["train/loss"] < 10


# --- own files -----------------------------------------------------------------------------------------------

OPERATION = """
from torch import nn
from blocks import conv_bn, register

EXPANSION = 2


def helper(n):
    return n * EXPANSION


@register("wide")
class Wide(nn.Module):
    def __init__(self, shape, width, affine):
        super().__init__()
        n = helper(shape.in_channels)
        self.layers = nn.Sequential(
            *conv_bn(shape.in_channels, n, 1, affine=affine),
            *conv_bn(n, shape.out_channels, 3, shape.stride, affine=affine),
        )

    def forward(self, x):
        return self.layers(x)
"""
RULE = """
from space.own import register_rule

SCALE = 1.0


@register_rule("own")
def own_rule(step, candidate, images, labels):
    logits = step.forward(candidate, images)
    yield SCALE * step.criterion(logits, labels), logits
"""


def test_a_file_that_is_changed_back_has_its_first_rule_again(tmp_path):
    path, found = tmp_path / "own.py", []
    for scale in ("1.0", "2.0", "1.0"):
        path.write_text("from training.step import single_path\n" + RULE.replace("SCALE = 1.0", f"SCALE = {scale}"))
        own.load(str(path))
        found.append((own.REGISTRIES["rule"]["own"].__globals__["SCALE"], own.hash_of("rule", "own")))
    assert found[0] == found[2] != found[1] and found[1][0] == 2.0
    path.write_text("from space.own import register_rule\nregister_rule('spos')(int)\n1 / 0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        own.load(str(path))
    assert own.REGISTRIES["rule"]["spos"] is single_path


def hashes(path, text):
    forget()
    path.write_text(text)
    own.load(str(path))
    return {kind: digest for (kind, _), digest in own.hashes.items()}


def test_each_kind_has_a_hash_of_the_code_it_uses(tmp_path):
    path = tmp_path / "own.py"
    before = hashes(path, OPERATION + RULE)
    assert before.keys() == {"operation", "rule"}
    assert hashes(path, OPERATION + RULE.replace("SCALE = 1.0", "SCALE = 2.0"))["operation"] == before["operation"]
    assert hashes(path, OPERATION.replace("EXPANSION = 2", "EXPANSION = 3") + RULE)["rule"] == before["rule"]
    for old, new, kind in (("SCALE = 1.0", "SCALE = 2.0", "rule"), ("EXPANSION = 2", "EXPANSION = 3", "operation"),
                           ("return n * EX", "return n + EX", "operation")):  # fmt: skip
        assert hashes(path, (OPERATION + RULE).replace(old, new))[kind] != before[kind]
    more = hashes(path, OPERATION + RULE + COST)
    assert more["rule"] == before["rule"] and more["operation"] == before["operation"]
    edited = hashes(path, OPERATION + RULE + COST.replace("7", "8"))
    assert edited["cost"] != more["cost"] and edited["searcher"] == more["searcher"]
    assert hashes(path, OPERATION + RULE + COST.replace("pass", "..."))["cost"] == more["cost"]
    both = hashes(path, OPERATION + RULE + "\nprint()\n")
    assert both["rule"] != before["rule"] and both["operation"] != before["operation"]
    assert hashes(path, OPERATION + RULE + '\n"""Text."""\n# a comment\n') == before


ELSEWHERE = """
import functools
from space.own import register_rule

try:
    from math import pi as half, tau as ANGLE
    AREA = 1
except ImportError:
    ANGLE = AREA = 0


def turned(angle, *given):
    yield angle, half


OTHER = register_rule("turned")(functools.partial(turned, 7))
"""


def test_a_hash_sees_what_a_call_registers_and_what_a_try_binds(tmp_path):
    path = tmp_path / "own.py"
    before = hashes(path, OPERATION + ELSEWHERE)
    for old, new in (("turned, 7", "turned, 8"), ("pi as half", "e as half")):
        found = hashes(path, OPERATION + ELSEWHERE.replace(old, new))
        assert found["rule"] != before["rule"] and found["operation"] == before["operation"]


def test_a_run_of_before_resumes_whose_rule_had_another_hash(tmp_path):
    text = OPERATION + ELSEWHERE
    now = {"settings": {"rule_code": hashes(tmp_path / "own.py", text)["rule"]}, "data": None}
    then = now | {"settings": {"rule_code": own._hash(text, [own.find("rule", "turned")])}}
    assert then != now
    check_settings(types.SimpleNamespace(content=then), now, tmp_path)


COST = """
import functools
from space.own import register_cost, register_searcher


def energy(scale, space):
    return [[scale * flops for flops in row] for row in space.costs.flops]


register_cost("energy", "mJ")(functools.partial(energy, 7))


@register_searcher("mine")
class Mine:
    pass
"""


def test_a_hash_of_before_is_that_of_the_whole_file(tmp_path):
    import hashlib

    path = tmp_path / "own.py"
    digest = hashes(path, OPERATION)["operation"]
    whole = hashlib.sha256(OPERATION.encode()).hexdigest()[:16]
    space = own.with_hash(dataclasses.replace(SPACE, operations=("wide", "shufflenet_3x3")))
    assert space.operations_hash == digest
    stored = space.to_dict() | {"operations_hash": whole}
    assert search_space.SearchSpace.from_dict(stored) == space
    own.check_operations(search_space.SearchSpace.from_dict(stored), "supernet.pth")


def test_the_commands_train_by_a_rule_and_refuse_another(data, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OPERATION + RULE)
    small = "--batch-size 4 --iterations {} --val-every 100 --bn-batches 1 --bn-batch-size 8 --val-paths 1 "
    small += "--sampler uniform"
    space = json.dumps({"stem": {"channels": 8}, "last": {"channels": 16}, "operations": ["wide", "shufflenet_3x3"],
                        "stages": [{"blocks": 2, "channels": 16, "stride": 2}]})  # fmt: skip
    (tmp_path / "space.yml").write_text(f'{{"space": {space}}}')
    words = (*data, "--space", tmp_path / "space.yml", "--own", path, "--out", tmp_path)
    run("supernet.py", *words, small.format(2), "--rule", "own")
    _, err = run("supernet.py", *words, small.format(2), code=2)
    assert "--rule spos (was own)" in err
    path.write_text(OPERATION + RULE.replace("SCALE = 1.0", "SCALE = 2.0"))
    forget()
    out, _ = run("tester.py", *words[len(data) + 2 :], "--mode gen")
    assert "2 choice blocks of 2 operations" in out  # the weights are readable
    _, err = run("supernet.py", *words, small.format(2), "--rule", "own", code=2)
    assert "code of the rule" in err and "--resume none" in err
    _, err = run("supernet.py", *words, small.format(2), "--rule", "none", code=2)
    assert "--rule none: is none of spos" in err


# --- several ranks -------------------------------------------------------------------------------------------


def _ranks(rank, out):
    own.load(RULES)
    for rule in ("fair", "sandwich"):
        torch.manual_seed(rank)
        model = ShuffleNetV2OneShot(space=SPACE)
        given = settings(iterations=3, rule=rule, micro_batch=2)
        train(model, Images(), given, PathSampler(SPACE, 0), run=TrainingRun(out / rule, "supernet", CONTENTS))
        torch.save(dict(model.named_parameters()), out / f"{rule}-{rank}.pth")
    for space, differs in ((dataclasses.replace(SPACE, widths=(0.5, 1.0)), 4), (SPACE, 0)):
        path = [0] * len(space.choices)
        path[differs] = rank  # a width, then an operation
        try:
            train(ShuffleNetV2OneShot(space=space), Images(), settings(iterations=1), lambda step, path=path: path)
        except UserError as error:
            (out / f"refused-{differs}-{rank}").write_text(str(error))


@pytest.mark.slow
def test_two_ranks_have_the_same_weights_and_no_rule_can_forget_their_mean(tmp_path):
    found = outcomes(_ranks, tmp_path)
    assert [code for code, _ in found] == [0, 0], found
    refused = [path.read_text() for path in tmp_path.glob("refused-*")]
    assert len(refused) == 4 and all("the ranks train different weights" in text for text in refused)
    for rule in ("fair", "sandwich"):
        one, other = (torch.load(tmp_path / f"{rule}-{rank}.pth") for rank in (0, 1))
        assert all(torch.equal(weights, other[name]) for name, weights in one.items())
