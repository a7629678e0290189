#!/usr/bin/env python
"""Prepare the small English model of the examples, as ``prepare_model.py minilm`` does."""

from bge_pruning.workflows.training_commands import prepare_minilm as main

if __name__ == "__main__":
    raise SystemExit(main())
