"""Model folders in the formats of other runtimes."""
