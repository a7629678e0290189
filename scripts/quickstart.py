#!/usr/bin/env python
"""Prune a real small model to half of its encoder on a CPU and compare it with the original.

python scripts/quickstart.py
python scripts/quickstart.py --multilingual
"""

from bge_pruning.workflows.training_commands import quickstart as main

if __name__ == "__main__":
    raise SystemExit(main())
