"""Gates, masked encoder, heads, losses, extraction: the arithmetic of the project."""
