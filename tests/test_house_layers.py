"""Imports point down, never sideways: proved on the syntax tree of every module, without importing any.

    L0 shared_profiles  <-  L1 blindsight_kernels  <-  L2 torch_blindsight | jax_blindsight  <-  L3 blindsight_cli

L0 takes nothing but the standard library and numpy. Inside L1 the lowerings of one operation never import each other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = (".", "kernels", "scripts")
LAYERS = {
    "shared_profiles": 0,
    "blindsight_kernels": 1,
    "torch_blindsight": 2,
    "jax_blindsight": 2,
    "blindsight_cli": 3,
    "blindsight_gpu": 3,
    "blindsight_study": 4,  # over the command
}
LOWERINGS = ("reference", "portable", "triton", "pallas")  # first word of a module's name in blindsight_kernels
NOT_PACKAGES = ("kernels", "scripts", "tests")  # folders that resolve as namespace packages from the repository root


def packages(root: Path) -> dict[str, Path]:
    """Maps the name of every top-level package under the source roots to its folder."""
    return {p.parent.name: p.parent for source in SOURCE_ROOTS for p in sorted((root / source).glob("*/__init__.py"))}


def absolute(name: str, level: int, package: list[str]) -> str:
    """Resolves a relative import: `level` dots, as seen from a module of `package`."""
    base = package[: len(package) - level + 1] if level else []
    return ".".join([*base, *filter(None, [name])])


def imports(path: Path, package: list[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of every import in a file, `import_module("literal")` included.

    `from a import b` yields "a.b", because `b` may be a module.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = absolute(module or "", level, package)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                bare = name.lstrip(".")
                yield node.lineno, absolute(bare, len(name) - len(bare), package)


def lowering(module: str) -> str | None:
    """Names the lowering that a dotted module name belongs to, None for anything the lowerings may share."""
    match module.split("."):
        case ["blindsight_kernels", name, *_] if name.split("_")[0] in LOWERINGS:
            return name.split("_")[0]
    return None


def forbidden(importer: str, imported: str) -> str | None:
    """Says why module `importer` must not import `imported` (both dotted and absolute), None where it may."""
    own, top = importer.split(".")[0], imported.split(".")[0]
    if top in NOT_PACKAGES:
        return f"{top}/ is a folder, not a package"
    if top != own and top in LAYERS and LAYERS[top] >= LAYERS[own]:
        return f"L{LAYERS[own]} may import only lower layers, and {top} is L{LAYERS[top]}"
    if LAYERS[own] == 0 and top not in (own, "numpy") and top not in sys.stdlib_module_names:
        return f"{own} takes only the standard library and numpy"
    mine, theirs = lowering(importer), lowering(imported)
    if mine and theirs and mine != theirs:
        return f"the {mine} and {theirs} lowerings never import each other; move what they share to a module of its own"
    return None


def violations(root: Path) -> list[str]:
    """Lists every forbidden import under `root` as "file:line: module imports name: reason"."""
    found = []
    for name, folder in packages(root).items():
        for path in sorted(folder.rglob("*.py")):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            package, module = parts[:-1], ".".join(parts[:-1] if path.name == "__init__.py" else parts)
            for line, imported in imports(path, package):
                if reason := forbidden(module, imported):
                    found.append(f"{path.relative_to(root)}:{line}: {module} imports {imported}: {reason}")
    return found


def test_every_package_has_a_layer():
    found = set(packages(ROOT)) - {"tests"}
    assert found <= set(LAYERS), f"give {sorted(found - set(LAYERS))} a layer in {Path(__file__).name}"
    assert found >= {"shared_profiles", "blindsight_kernels", "torch_blindsight", "blindsight_cli"}


def test_imports_point_down():
    assert not (found := violations(ROOT)), "\n" + "\n".join(found)


def test_source_roots_are_not_packages():
    for name in ("kernels", "scripts"):
        init = ROOT / name / "__init__.py"
        assert not init.exists(), (
            f"remove {init}: a package {name!r} would shadow others of that name, see CONTRIBUTING.md"
        )


PLANTED = {
    "up": ("shared_profiles/plan.py", "import torch_blindsight", "L0 may import only lower layers"),
    "up-inside-a-function": ("torch_blindsight/a.py", "def f():\n    import blindsight_cli.main", "L2 may import only"),
    "sideways": ("torch_blindsight/a.py", "from jax_blindsight.b import c", "L2 may import only lower layers"),
    "by-name": ("jax_blindsight/a.py", "importlib.import_module('torch_blindsight.b')", "L2 may import only lower"),
    "third-party-in-L0": ("shared_profiles/plan.py", "import torch", "only the standard library and numpy"),
    "lowerings": ("kernels/blindsight_kernels/triton_a.py", "from blindsight_kernels import pallas_b", "never import"),
    "lowerings-relative": ("kernels/blindsight_kernels/pallas_a.py", "from . import triton_b", "never import"),
    "lowerings-nested": ("kernels/blindsight_kernels/triton/a.py", "from ..reference import b", "never import"),
    "through-a-folder": ("scripts/blindsight_cli/a.py", "from kernels.blindsight_kernels import b", "not a package"),
}


def plant(root: Path, file: str, code: str) -> None:
    """Writes a tree of empty packages with one module in it."""
    for name, layer in LAYERS.items():
        source = {1: "kernels", 3: "scripts", 4: "scripts"}.get(layer, ".")
        (root / source / name).mkdir(parents=True)
        (root / source / name / "__init__.py").touch()
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text(f"import os\n{code}\n")


@pytest.mark.parametrize(("file", "code", "reason"), PLANTED.values(), ids=PLANTED)
def test_a_planted_import_is_found(tmp_path, file, code, reason):
    plant(tmp_path, file, code)
    (found,) = violations(tmp_path)
    line = 1 + len(code.splitlines())
    assert found.startswith(f"{file}:{line}: ")
    assert reason in found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("shared_profiles/plan.py", "import numpy as np\nfrom collections.abc import Iterator\nfrom . import masks"),
        (
            "kernels/blindsight_kernels/triton_a.py",
            "import triton\nfrom . import triton_b, tiles\nimport shared_profiles",
        ),
        ("scripts/blindsight_cli/a.py", "import torch_blindsight, jax_blindsight, blindsight_kernels.triton_a, typer"),
    ],
    ids=["L0", "L1", "L3"],
)
def test_a_downward_import_is_allowed(tmp_path, file, code):
    plant(tmp_path, file, code)
    assert violations(tmp_path) == []
