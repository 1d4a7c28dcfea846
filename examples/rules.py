"""Training rules of other papers: supernet.py --own examples/rules.py --rule fair, or train(..., rule="fair")."""

import functools
import math

from torch.nn.functional import cross_entropy

from space.own import register_rule


@register_rule("fair")
def strictly_fair(step, candidate, images, labels):
    """FairNAS (Chu et al., arXiv 1907.01845): paths that together take the choices of every block equally often."""
    rng = step.rng
    n = math.lcm(*step.space.choices)
    columns = [[c for _ in range(n // k) for c in rng.sample(range(k), k)] for k in step.space.choices]
    for path in zip(*columns):
        logits = step.forward(path, images)
        yield step.criterion(logits, labels), logits


@register_rule("sandwich")
def sandwich(step, candidate, images, labels):
    """Universally slimmable networks (Yu and Huang, arXiv 1903.05134): the largest path learns the labels; the smallest
    and two random ones learn what it says of the images."""
    rng, space = step.rng, step.space
    logits = step.forward(space.largest(), images)
    yield step.criterion(logits, labels), logits
    taught = logits.detach().softmax(dim=1)
    for path in (space.smallest(), space.random_candidate(rng), space.random_candidate(rng)):
        logits = step.forward(path, images)
        yield cross_entropy(logits, taught), logits


def in_half(space, candidate, half):
    """Whether the operation of the first block is of the first (0) or the second half (1) of all."""
    return 2 * candidate[0] // space.choices[0] == half


def few_shot(step, candidate, images, labels, half):
    """Few-shot NAS (Zhao et al., arXiv 2006.06863): a supernet of the paths whose first operation is of one half."""
    operations = [choice for choice in range(step.space.choices[0]) if in_half(step.space, (choice,), half)]
    logits = step.forward((step.rng.choice(operations), *candidate[1:]), images)
    yield step.criterion(logits, labels), logits


for _half in range(2):
    _rule = functools.partial(few_shot, half=_half)
    _rule.trains = functools.partial(in_half, half=_half)  # for bench/spaces.py: which candidates it scores
    register_rule(f"half-{_half}")(_rule)
