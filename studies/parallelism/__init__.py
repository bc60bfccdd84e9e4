"""Why the attention kernels are mapped to the GPU as they are: variants of them, measured side by side.

`python3 -m studies.parallelism` from the repository's root; docs/parallelism.md explains the results.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The benchmarks' modules, which time and print here too, import each other by name.
for folder in (ROOT, ROOT / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
