#!/usr/bin/env python
"""Train on one process; the same as ``composer -n 1 -m bge_pruning.train``.

python scripts/train_pruning.py configs/bge_m3/target_60pct.yaml dry_run=true
"""

from bge_pruning.train import main

if __name__ == "__main__":
    raise SystemExit(main())
