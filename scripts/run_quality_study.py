#!/usr/bin/env python
"""Run a grid of methods, sizes and seeds, and write what each keeps as a table and a picture.

    python scripts/run_quality_study.py configs/quality/study.yaml
    python scripts/run_quality_study.py configs/quality/study.yaml --only method=l0 size=50pct

Run again, it goes on where it was stopped. Run several times at once, say on a GPU that one process
does not fill, the processes share the cells (on a file system with locks). Every finished cell is a
file under cells in the results folder of the study; the table, the picture and summary.json beside
them are made of these.
"""

from bge_pruning.workflows.measurement_commands import study as main

if __name__ == "__main__":
    raise SystemExit(main())
