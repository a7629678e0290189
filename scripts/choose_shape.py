#!/usr/bin/env python
"""Say which shape of a size keeps most, by cutting and fitting each, without training.

    python scripts/choose_shape.py configs/minilm/quickstart.yaml
    python scripts/choose_shape.py my.yaml model.l0_module.target_speedup=2

The size is the target of the configuration: a share or a number of the encoder's parameters, a
speed-up, or that of the shape which it names. All depths are measured at the full width, then the
depths around the best one at smaller widths, for as long as that helps.
"""

from bge_pruning.workflows.training_commands import shape as main

if __name__ == "__main__":
    raise SystemExit(main())
