#!/usr/bin/env python
"""Put several evaluated models in one table and one picture: quality against size and time.

    python scripts/compare_runs.py experiments/results/half experiments/results/small \
        --output experiments/results/comparison

A model is a results folder or an evaluation file, optionally as NAME=PATH. Those that have the same
name are runs of one thing with different seeds: their mean and range are shown.
"""

from bge_pruning.workflows.measurement_commands import compare as main

if __name__ == "__main__":
    raise SystemExit(main())
