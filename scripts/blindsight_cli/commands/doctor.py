"""`blindsight doctor`: does this installation work, and if not, what is to be done."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from blindsight_cli.errors import ExitCode, IncompatibleError, install_advice
from blindsight_cli.folders import is_for_jax
from blindsight_cli.output import print_json, results

MINIMUM = {
    "numpy": "2.0",
    "torch": "2.11",
    "torchvision": "0.26",
    "transformers": "5.17",
    "safetensors": "0.5",
    "pillow": "10",
    "tqdm": "4.60",
}
"""Lower bounds of what the PyTorch side needs, as in `pyproject.toml`."""
MINIMUM_JAX = {"jax": "0.11.2", "flax": "0.12.12", "orbax-checkpoint": "0.12.8", "ml-dtypes": "0.5"}
"""Lower bounds of what the JAX side needs besides; only where there is JAX are they looked at."""
PYTHON = (3, 12)
OURS = {"shared_profiles": "masks.py", "blindsight_kernels": "reference.py", "torch_blindsight": "patching.py"}
"""Our packages, with a file that tells them from others of the same name."""

OK, FAILED, INCOMPATIBLE, INFO, SKIPPED = "ok", "failed", "incompatible", "info", "skipped"
_MARKS = {
    OK: ("✓", "green"),
    FAILED: ("✗", "bold red"),
    INCOMPATIBLE: ("✗", "bold red"),
    INFO: ("·", "bright_black"),
    SKIPPED: ("-", "yellow"),
}
_REINSTALL = f"Install the tested versions. {install_advice('torch')} -c constraints.txt."


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, one of the five states, what was found, and what to do about it."""

    name: str
    status: str
    detail: str
    advice: str = ""


class Failed(Exception):
    """A check failed: what was found, and what to do."""

    def __init__(self, detail: str, advice: str) -> None:
        super().__init__(detail)
        self.detail, self.advice = detail, advice


def run_doctor(checkpoint: Path | None, *, as_json: bool) -> int:
    """Checks everything, prints every finding, and returns the exit code."""
    checks = [*check_versions()]
    usable = {c.name for c in checks if c.status == OK} >= {"numpy", "torch", "transformers", "safetensors", "tqdm"}
    checks.append(_checked("package names", check_names))
    framework: dict[str, Callable[[], str]] = {
        "processors": check_processors,
        "attention functions": check_attention,
        "a patch takes": check_patch,
    }
    if usable:
        checks.append(check_gpu())
    for name, check in framework.items():
        if usable:
            checks.append(_checked(name, check))
        else:
            checks.append(Check(name, SKIPPED, "needs the packages above"))
    if checkpoint is not None:
        checks += list(_check_checkpoint(checkpoint)) if usable else [Check("checkpoint", SKIPPED, "see above")]
    states = {check.status for check in checks}
    code = ExitCode.CHECK_FAILED if FAILED in states else ExitCode.OK
    if INCOMPATIBLE in states:
        code = ExitCode.INCOMPATIBLE
    if as_json:
        print_json({"ok": code == ExitCode.OK, "exit_code": int(code), "checks": [asdict(check) for check in checks]})
    else:
        _print(checks, code)
    return code


def _checked(name: str, check: Callable[[], str]) -> Check:
    """Runs one check; whatever it raises is its finding."""
    try:
        return Check(name, OK, check())
    except Failed as failed:
        return Check(name, FAILED, failed.detail, failed.advice)
    except Exception as error:
        return Check(name, FAILED, f"{type(error).__name__}: {error}", _REINSTALL)


def check_versions() -> Iterator[Check]:
    """Python and every package, without importing any."""
    python = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= PYTHON
    needed = ".".join(map(str, PYTHON))
    yield Check("python", OK if good else INCOMPATIBLE, python, "" if good else f"Use Python {needed} or later.")
    for_jax = {name: least for name, least in MINIMUM_JAX.items() if _version("jax") and _version(name)}
    for name, least in {**MINIMUM, **for_jax}.items():
        found = _version(name)
        if found is None:
            yield Check(name, FAILED, "not installed", f"{install_advice('torch')}.")
        elif _numbers(found) < _numbers(least):
            renew = f"Renew it: pip install -U '{name}>={least}'."
            yield Check(name, INCOMPATIBLE, f"{found}, older than {least}", renew)
        else:
            yield Check(name, OK, found)
    yield Check("triton", INFO, _version("triton") or "not installed; not needed")
    for name in MINIMUM_JAX:
        if name not in for_jax:
            yield Check(
                name, INFO, _version(name) or "not installed; only --backend jax and blindsight convert need it"
            )


def check_names() -> str:
    """No other package stands in the way of ours, and ours in nobody's."""
    for name, file in OURS.items():
        copies = _copies(name)
        if not copies or not (copies[0] / file).is_file():
            where = f"{copies[0]} is another package" if copies else "not found"
            raise Failed(f"{name}: {where}", "Rename or remove it, or put BlindSight first on the path.")
        if len(copies) > 1:
            others = ", ".join(map(str, copies[1:]))
            raise Failed(
                f"{name} is there more than once: {copies[0]} is used, not {others}",
                "Uninstall one (pip uninstall blindsight-vlm), or leave the other source tree out of PYTHONPATH.",
            )
    # A folder without __init__.py has no origin, and does no harm.
    kernels = importlib.util.find_spec("kernels")
    if kernels is not None and kernels.origin is not None:
        folder = Path(kernels.origin).parent
        if (folder / "blindsight_kernels").is_dir():
            raise Failed(
                f"{kernels.origin} makes our folder a package, which hides the Hugging Face package `kernels`",
                f"Remove {kernels.origin}.",
            )
        if _version("kernels") is None:
            raise Failed(
                f"{folder} is a package called `kernels`, but not the one that transformers looks for",
                "Rename it, or leave its parent out of PYTHONPATH.",
            )
    return "no clashes"


def _copies(name: str) -> list[Path]:
    """Every folder that could be imported under a name, the one that is first."""
    spec = importlib.util.find_spec(name)
    used = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    folders = [*used, *(Path(entry or ".") / name for entry in sys.path)]
    return list(dict.fromkeys(f.resolve() for f in folders if (f / "__init__.py").is_file()))


def check_gpu() -> Check:
    """Whether torch sees a GPU; it need not."""
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", INFO, "none; everything runs on the CPU")
    return Check("gpu", INFO, ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))


def check_processors() -> str:
    """A Qwen2.5-VL processor can be made and reads a picture."""
    from PIL import Image

    from blindsight_cli.loading import ask
    from blindsight_cli.smallvlm.build import make_processor

    try:
        inputs = ask(make_processor(), [Image.new("RGB", (64, 64))], "What color is image 1?")
    except (ImportError, RuntimeError) as error:  # not installed, or built for another torch
        reason = " ".join(str(error).split()).partition(" Check out")[0]
        raise Failed(
            f"Qwen processors cannot be used: {reason}",
            "They need the torchvision made for this torch: pip install -U torchvision.",
        ) from error
    return f"a picture becomes {tuple(inputs['pixel_values'].shape)} patches"


def check_attention() -> str:
    """Transformers' tables hold our functions under our name."""
    from torch_blindsight.attention import NAME, register, registered

    register()
    if not registered():
        raise Failed(
            f"transformers calls another function under the name {NAME!r}",
            "Something else sets it; remove that, or start a fresh process.",
        )
    return f"transformers calls ours under {NAME!r}"


def check_patch() -> str:
    """A tiny random Qwen2.5-VL takes a patch, prefills sparsely, and is itself again afterwards."""
    import torch

    from blindsight_cli.random_model import make_random_model, make_random_prompt
    from shared_profiles import Category
    from shared_profiles.profile import Profile
    from torch_blindsight import fingerprint, patch

    model = make_random_model(hidden=64, layers=2, heads=4, kv_heads=2)
    prompt = make_random_prompt(n_images=3, grid=4, text=8)
    print_ = fingerprint(model)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(**prompt, use_cache=False).logits  # [1, N, vocabulary]

    plain = forward()
    logits = {}
    for impl in ("portable", "reference"):
        with patch(model, Profile.uniform(Category.INTRA_IMAGE, print_), impl=impl, break_even=False) as handle:
            logits[impl] = forward()
            if (forwards := handle.report()["forwards"]) != {"sparse": 1}:
                raise Failed(f"the patched model did not prefill sparsely: {forwards}", _REINSTALL)
    if (apart := float((logits["portable"] - logits["reference"]).abs().max())) > 1e-4:
        raise Failed(f"sparse attention is {apart:.1e} off its float64 reference", _REINSTALL)
    if torch.allclose(logits["portable"], plain, atol=1e-6):
        raise Failed("the patched model computes what the unpatched one does", _REINSTALL)
    with patch(model, Profile.uniform(Category.DENSE, print_)):
        dense = forward()
    for name, again in {"with a dense profile": dense, "after unpatch": forward()}.items():
        if not torch.equal(again, plain):
            raise Failed(f"logits {name} are not those of the unpatched model", _REINSTALL)
    return f"sparse within {apart:.0e} of the reference, dense and unpatched bit for bit"


def _check_checkpoint(folder: Path) -> Iterator[Check]:
    """Family and shape of a checkpoint, its processor, its fingerprint, and the profile that would be used."""
    from blindsight_cli.loading import load_model, load_processor
    from blindsight_cli.report import figures
    from shared_profiles.lookup import find_profile
    from shared_profiles.profile import ProfileError
    from torch_blindsight import fingerprint

    if is_for_jax(folder):
        yield Check("checkpoint", INFO, "converted for JAX by blindsight convert; use it with --backend jax")
        return
    try:
        model = load_model(folder)
    except (ValueError, OSError) as error:
        status = INCOMPATIBLE if isinstance(error, IncompatibleError) else FAILED
        yield Check("checkpoint", status, str(error), "Name a folder of a Qwen2-VL, Qwen2.5-VL or Gemma 3 checkpoint.")
        return
    print_ = fingerprint(model)
    shape = f"{print_.n_layers} layers of {print_.n_heads} heads ({print_.n_kv_heads} key/value)"
    size = figures.parameters(sum(p.numel() for p in model.parameters()))
    yield Check("checkpoint", OK, f"{print_.family}, {shape}, {size} parameters")
    yield Check("fingerprint", INFO, print_.digest)
    try:
        load_processor(folder)
    except ValueError as error:
        yield Check("its processor", FAILED, str(error))
    else:
        yield Check("its processor", OK, "loads")
    try:
        found = find_profile(print_, str(folder))
    except (ProfileError, OSError) as error:
        status = INCOMPATIBLE if isinstance(error, ProfileError) else FAILED
        yield Check("its profile", status, str(error), "Remove that file, and run blindsight calibrate again.")
        return
    if found is None:
        yield Check("its profile", INFO, f"none; make one with blindsight calibrate {folder} prompts.jsonl")
    else:
        counts = ", ".join(f"{n} {category.name}" for category, n in found[0].counts().items())
        yield Check("its profile", OK, f"{found[1]} ({counts})")


def _print(checks: list[Check], code: ExitCode) -> None:
    """One line per finding, what to do below it, and the verdict."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    for check in checks:
        mark, style = _MARKS[check.status]
        table.add_row(Text(mark, style), check.name, Text(check.detail, style if check.status != OK else ""))
        if check.advice:
            table.add_row("", "", Text(check.advice))
    console = results()
    console.print(table)
    failed = sum(check.status in (FAILED, INCOMPATIBLE) for check in checks)
    verdict = "all is well" if code == ExitCode.OK else f"{failed} problem{'s' * (failed != 1)}"
    console.print(f"\n{verdict}", style="bold green" if code == ExitCode.OK else "bold red")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.11.0+cu130" -> (2, 11, 0)."""
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", version)[0].split("."))  # type: ignore[index]
