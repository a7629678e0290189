"""Records become text and pictures."""
