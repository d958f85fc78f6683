"""What every test gets: one thread, fixed seeds, no network, and the `gpu` marker."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch and transformers are first imported, here or in a subprocess a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share few cores, and sums keep one order
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take the GPU's memory from torch
os.environ.pop("JAX_ENABLE_X64", None)  # JAX's simulator of GPUs counts in 32 bits, and users may have it on
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub fails at once, wherever it runs
if shutil.which("nvidia-smi") is None:  # programs of tiny models take longer to optimize than to run
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import numpy as np
import pytest
from hypothesis import settings

# No deadline: a shared machine pauses at will. Derandomized: a red run can be repeated as it was.
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


# Files whose tests share nothing that takes long: they run wherever there is time, last, and fill both workers up.
LOOSE = ("test_profiles_", "test_house_", "test_kernels_triton_compile")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps each file's tests in one worker, which compiles its programs and builds its models once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None and not item.path.stem.startswith(LOOSE):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seeds the global generators; torch only where the test has imported it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """Convolutions of torch in full float32, as those of JAX are: cuDNN rounds to TF32 by default."""
    if "torch" not in sys.modules:  # a `gpu` test has imported it by now
        yield
        return
    cudnn = sys.modules["torch"].backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    yield
    cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of each test's own: none finds the profiles of another, or leaves some with the user."""
    monkeypatch.setenv("BLINDSIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text without colours and of its own width, whatever a CI or the user's shell asks for."""
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_grad():
    """Runs a test without gradients, as models are served."""
    import torch

    with torch.no_grad():
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips `gpu` tests where no GPU is usable; torch is imported only if such a test is about to run."""
    if item.get_closest_marker("gpu") is None:
        return
    torch = pytest.importorskip("torch", reason="needs a CUDA GPU, and torch to reach it; torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch.cuda.is_available() is False here")


_lost: set[str] = set()  # tests after which this process can use the GPU no more


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Notes a failed launch: after an illegal access every later CUDA call of the process fails."""
    error = call.excinfo and call.excinfo.value
    if isinstance(error, RuntimeError):
        import tree_scripts  # noqa: F401  (blindsight_gpu is not installed)
        from blindsight_gpu.results import is_sticky

        if is_sticky(str(error)):
            _lost.add(item.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Ends xdist's worker behind such a test, so that another runs the rest of its file."""
    if nodeid in _lost and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadfile`: xdist's own would run a test that ended its worker again and again, and no other."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Once(LoadFileScheduling):
        def remove_node(self, node: Any) -> str | None:
            units = self.assigned_work[node].values()
            running = next(((unit, test) for unit in units for test, done in unit.items() if not done), None)
            if running is None:
                return super().remove_node(node)
            unit, test = running
            unit[test] = True
            super().remove_node(node)
            return test

    return Once(config, log)
