"""The search space: which candidates there are, what they cost, which of them a training step takes."""
