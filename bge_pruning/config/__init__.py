"""What may be asked of a run, and whether it makes sense."""
