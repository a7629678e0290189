"""Which units stay, and the refit after a cut, without a training step."""
