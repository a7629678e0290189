#!/usr/bin/env python
"""Make several sizes from one pruning run, each cut from the next larger one and trained on.

    python scripts/export_family.py configs/minilm/quickstart.yaml --densities 0.75 0.6 0.5 \
        --sts data/sts/stsb-en-test.csv

The models lie in RESULTS-family/75pct/model and so on, with a comparison beside them. A call that
was interrupted goes on where it stopped if it is made again with autoresume=true.
"""

from bge_pruning.workflows.training_commands import family as main

if __name__ == "__main__":
    raise SystemExit(main())
