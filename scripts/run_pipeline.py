#!/usr/bin/env python
"""Prune, extract, recover, evaluate and report in one command.

    python scripts/run_pipeline.py configs/minilm/quickstart.yaml --sts data/sts/stsb-en-test.csv

The first step of a baseline can be run alone. It chooses what stays, without training, and writes
pruned_model in the results folder, where a recovery finds it:

    python scripts/run_pipeline.py configs/minilm/quickstart.yaml method=magnitude --only cut
    python scripts/train_pruning.py configs/minilm/quickstart.yaml method=magnitude stage=recover
"""

from bge_pruning.workflows.training_commands import pipeline as main

if __name__ == "__main__":
    raise SystemExit(main())
