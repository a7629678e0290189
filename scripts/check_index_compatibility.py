#!/usr/bin/env python
"""Tell whether an index of OLD's vectors keeps working when NEW embeds the queries.

    python scripts/check_index_compatibility.py BAAI/bge-m3 my_small_model --texts passages.txt

Both models have to give vectors of the same size. They do after pruning layers, units or heads
alone. A model with fewer hidden dimensions gives them if it was extracted with --keep-dimension.
"""

from bge_pruning.workflows.model_commands import index as main

if __name__ == "__main__":
    raise SystemExit(main())
