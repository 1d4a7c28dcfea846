"""The search space: which candidates there are, what they cost, which of them a training step takes."""

import settings  # noqa: F401 (says which file of a program stands in the way)
