"""Training rules of other papers: supernet.py --own examples/rules.py --rule fair, or train(..., rule="fair")."""

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


class Half:
    """Few-shot NAS (Zhao et al., arXiv 2006.06863): one of two supernets that share the operations of the first block.

    Each trains as the paper does, and scores the candidates that it trains: those with half 0 or 1 of the operations.
    """

    def __init__(self, half):
        self.half = half

    def trains(self, space, candidate):
        """Whether a candidate is one of this supernet."""
        return 2 * candidate[0] // space.choices[0] == self.half

    def __call__(self, step, candidate, images, labels):
        own = [choice for choice in range(step.space.choices[0]) if self.trains(step.space, (choice,))]
        logits = step.forward((step.rng.choice(own), *candidate[1:]), images)
        yield step.criterion(logits, labels), logits


register_rule("half-0")(Half(0))
register_rule("half-1")(Half(1))
