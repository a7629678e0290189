"""What changes a training step."""
