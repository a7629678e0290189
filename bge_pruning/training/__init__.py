"""A configuration becomes a Composer trainer, and runs."""
