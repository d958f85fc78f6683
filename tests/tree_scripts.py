"""The scripts that need the project's tree: where they are, and running them as the README says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "scripts"))
sys.path.append(str(ROOT / "scripts"))  # they run from the tree and are not installed


def python(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a script with the source roots on its path."""
    environment = {**os.environ, "PYTHONPATH": SOURCE_ROOTS}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560, check=False, cwd=ROOT)
