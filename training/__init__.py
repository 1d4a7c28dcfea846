"""Training and evaluation: the training loop and its checkpoints, BN recalibration, accuracy, export."""
