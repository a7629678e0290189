#!/usr/bin/env python
"""Give an encoder BGE-M3's sparse and multi-vector heads, trained on its frozen states.

    python scripts/train_heads.py configs/m3_small/heads.yaml
    python scripts/train_heads.py my.yaml --colbert-dim 128 max_duration=200ba

The encoder keeps every bit. The model is written to the results folder, and its retrieval with each
output before and after is printed where the configuration names collections under data.eval.
"""

from bge_pruning.workflows.training_commands import heads as main

if __name__ == "__main__":
    raise SystemExit(main())
