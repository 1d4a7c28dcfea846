"""Training and evaluation: the training loop and its checkpoints, BN recalibration, accuracy, export."""

import settings  # noqa: F401 (says which file of a program stands in the way)
