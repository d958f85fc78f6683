"""What an import costs and touches, each seen in a fresh process started at the repository root."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "jax", "triton", "matplotlib", "PIL")


def python(*args: str) -> str:
    """Runs a fresh interpreter at the repository root, which is then first on its path; returns its stdout."""
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str, names: tuple[str, ...]) -> list[str]:
    """Says which of the named top-level modules are loaded once the code has run."""
    out = python(
        "-c", f"{code}\nimport json, sys\nprint()\nprint(json.dumps([n for n in {names} if n in sys.modules]))"
    )
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("package", ["shared_profiles", "blindsight_kernels"])
def test_numpy_layers_load_no_framework(package):
    assert loaded(f"import {package}", (*HEAVY, "typer", "rich")) == []


def test_help_loads_nothing_heavy():
    code = """
import sys
from blindsight_cli.main import main
sys.argv = ["blindsight", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert loaded(code, (*HEAVY, "numpy")) == []


def test_help_runs_as_a_module():
    assert "usage" in python("-m", "blindsight_cli.main", "--help").lower()


def test_torch_package_is_inert_at_import():
    """And transformers imports here: our folder `kernels` does not shadow the package of that name it looks for."""
    code = """
import contextlib, io, sys
import torch
import transformers.models.qwen2_vl.modeling_qwen2_vl
from transformers import AttentionInterface, AttentionMaskInterface
sys.modules.update({"jax": None, "triton": None})  # blocked: importing them fails from here on
tables = AttentionInterface(), AttentionMaskInterface()
before = [sorted(t) for t in tables]
with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
    import torch_blindsight
assert not said.getvalue(), f"torch_blindsight prints when imported: {said.getvalue()!r}"
assert [sorted(t) for t in tables] == before, "torch_blindsight registers something when imported"
assert not torch.cuda.is_initialized(), "torch_blindsight touches the GPU when imported"
"""
    python("-c", code)
