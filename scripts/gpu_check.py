"""The one script for a machine with a GPU: is it right, and how fast. Needs the project's tree, not an installation.

    PYTHONPATH=.:kernels:scripts python scripts/gpu_check.py --out docs/results [--part bounds,attention] [--resume]

Each part runs in a process of its own and writes `gpu-PART.json`; `python scripts/render_results.py` puts the figures
into the README. `--dry-run` runs every part on a CPU at toy size, to prove the script itself.
"""

import sys

from blindsight_gpu.runner import main

if __name__ == "__main__":
    sys.exit(main())
