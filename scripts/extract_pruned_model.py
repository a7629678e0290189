#!/usr/bin/env python
"""Write the model of a run as an ordinary, smaller model folder, and validate it.

python scripts/extract_pruned_model.py experiments/checkpoints/quickstart my_small_model --onnx
"""

from bge_pruning.workflows.model_commands import extract as main

if __name__ == "__main__":
    raise SystemExit(main())
