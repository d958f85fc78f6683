"""What a result depends on: the GPU, its driver and clocks, the versions, and the source it was measured from."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SOURCES = (
    "shared_profiles",
    "kernels/blindsight_kernels",
    "torch_blindsight",
    "jax_blindsight",
)
_PACKAGES = ("torch", "triton", "transformers", "numpy", "jax", "jaxlib", "jax-cuda13-plugin", "flax", "tokamax")
_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "driver_version")


def describe(dry_run: bool) -> dict[str, Any]:
    """The machine, as JSON values. Clocks are read, never set.

    Args:
        dry_run: leave the GPU out: nothing is measured on it.
    """
    import torch  # only here: result files are read without it

    gpu: dict[str, Any] = {"name": f"none (dry run on {platform.processor() or platform.machine()})"}
    if not dry_run:
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            **_clocks(),
        }
    versions = {name: _version(name) for name in _PACKAGES}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    versions["cudnn"] = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {"gpu": gpu, "versions": versions, "commit": _commit(), "source": _source_digest()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results were measured from the same source, on the same kind of GPU, with the same versions."""

    def identity(machine: dict[str, Any]) -> tuple:
        return machine["source"], machine["gpu"]["name"], machine["versions"]

    return identity(one) == identity(other)


def _clocks() -> dict[str, str]:
    query = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"clocks": f"not read: {error}"}
    return dict(zip(_CLOCKS, map(str.strip, done.stdout.split(",")), strict=False))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with a plus sign where the tree differs from it; without git what `BLINDSIGHT_COMMIT` holds."""
    try:
        done = [
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("BLINDSIGHT_COMMIT")
    return done[0].strip() + "+" * bool(done[1].strip())


def _source_digest() -> str:
    """A hash of the modules that are measured, not of those that measure: a mended script spoils no earlier result."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _SOURCES for path in (ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
