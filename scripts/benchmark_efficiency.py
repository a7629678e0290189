#!/usr/bin/env python
"""Measure how fast a model is beside its original, and how much of the ideal speed-up that is.

    python scripts/benchmark_efficiency.py experiments/results/quickstart/model \
        --baseline experiments/checkpoints/minilm-xlmr --texts data/sts/stsb-en-test.csv

Before anything is pruned, a configuration stands for random weights of its target beside random
weights of its source; and a GPU and other runtimes are measured in the same way:

    python scripts/benchmark_efficiency.py configs/bge_m3/target_50pct.yaml --device cuda \
        --dtype bf16 --runtimes torch compile --lengths 16 128 512 8192 --output bench.json

The ideal is the ratio of floating-point operations. A ratio with far-apart quartiles, or of too few
turns, is printed with its spread, and not called reached or missed.
"""

from bge_pruning.workflows.measurement_commands import benchmark as main

if __name__ == "__main__":
    raise SystemExit(main())
