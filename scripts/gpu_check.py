"""The one script for a machine with a GPU: is it right, and how fast. Needs the project's tree, not an installation.

    export PYTHONPATH=.:kernels:scripts
    python scripts/gpu_check.py --out docs/results --part correctness,attention,bounds,sanitizer
    python scripts/gpu_check.py --out docs/results --part model,pallas,attention_more,profile
    python scripts/gpu_check.py --out docs/results --part jax_model,calibration,tune

Each command takes at most ten minutes, prints its parts' estimates first, and begins with the rows that the targets
speak of: what there is no time for is named. `--resume` measures what failed or was left out. `--dry-run` runs parts on
a CPU at toy size, to prove the script itself.

Each part runs in a process of its own and writes `gpu-PART.json`, some a `gpu-PART.log` too: at most eight files a
command. Measured elsewhere, copy them to `docs/results`; where the tree travels without `.git`, set `BLINDSIGHT_COMMIT`
to the commit. `python scripts/render_results.py` puts the figures into the README.
"""

import sys

from blindsight_gpu.runner import main

if __name__ == "__main__":
    sys.exit(main())
