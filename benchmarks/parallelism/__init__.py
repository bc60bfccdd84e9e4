"""Why the attention kernels are mapped to the GPU as they are: variants of them, measured side by side.

`python3 -m benchmarks.parallelism` from the repository's root; docs/parallelism.md explains the results.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (
    ROOT,
    ROOT / "benchmarks",
):  # the other benchmarks' modules import each other by name
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
