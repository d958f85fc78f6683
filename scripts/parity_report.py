"""Measures how equal the two frameworks are, with the parity suite's own functions: `parity.json` and `parity.html`.

    python scripts/parity_report.py --out docs/results
    python scripts/parity_report.py --write-golden        only after a change of meaning that is meant

Where torch and JAX reach a CUDA GPU the kernels run there; else Triton is interpreted, Pallas simulated. Runs from the
source tree. Exits with 1 where something differs by more than is allowed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "scripts", "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 where everything measured is equal."""
    from blindsight_gpu.parts import some_of
    from parity_document import PARTS, count

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of parity.json and parity.html")
    parser.add_argument("--part", type=some_of(PARTS), default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument(
        "--write-golden", action="store_true", help="write the files of tests/golden anew, nothing else"
    )
    asked = parser.parse_args(arguments)
    if asked.write_golden:
        return _write_golden()

    from transformers.utils import logging

    logging.disable_progress_bar()
    device = _device()
    begun = time.monotonic()
    document: dict[str, Any] = dict(
        schema="blindsight.parity/1",
        device=device,
        command=" ".join([Path(sys.argv[0]).name, *(sys.argv[1:] if arguments is None else arguments)]),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=_machine(device),
    )
    for part in asked.part:
        print(f"== {part}", flush=True)
        document[part] = PARTS[part](device)
    n, n_equal = count(document)
    document |= dict(comparisons=n, equal=n_equal, seconds=round(time.monotonic() - begun, 1))
    _write(document, asked.out)
    print(f"{n_equal} of {n} comparisons are within what is allowed, {document['seconds']} s: {asked.out}/parity.html")
    return 0 if n == n_equal else 1


def _device() -> str:
    """Where to run: "cuda" if both frameworks reach a GPU, else "cpu"."""
    import jax
    import torch

    both = torch.cuda.is_available() and jax.default_backend() == "gpu"
    if torch.cuda.is_available() and not both:
        print("torch reaches a GPU, JAX does not (pip install 'jax[cuda13]'): everything runs on the CPU")
    return "cuda" if both else "cpu"


def _machine(device: str) -> dict[str, Any]:
    """The environment, as the GPU results have it, and JAX's versions."""
    from importlib.metadata import version

    from blindsight_gpu.machine import describe

    machine = describe(dry_run=device == "cpu")
    machine["versions"] |= {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    machine["gpu"] = machine["gpu"] if device == "cuda" else None
    return machine


def _write(document: dict[str, Any], folder: Path) -> None:
    from blindsight_cli.folders import write_json
    from blindsight_cli.report.parity import render_parity
    from shared_profiles._atomic import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "parity.json", document)
    write_atomically(folder / "parity.html", render_parity(document).encode())


def _write_golden() -> int:
    from parity_golden import FOLDER, write

    changed = write()
    print(f"{FOLDER}: " + (f"changed {', '.join(changed)}; look at the difference" if changed else "nothing changed"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
