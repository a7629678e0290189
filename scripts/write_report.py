#!/usr/bin/env python
"""Write report.md, its pictures and report.html from the files of a results or run folder.

python scripts/write_report.py experiments/results/half
"""

from bge_pruning.workflows.measurement_commands import report as main

if __name__ == "__main__":
    raise SystemExit(main())
