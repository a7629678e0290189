"""Model folders, the hub and checkpoints, to modules and back."""
