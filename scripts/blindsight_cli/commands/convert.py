"""`blindsight convert`: a Hugging Face checkpoint becomes a folder that the JAX backend loads."""

from __future__ import annotations

import time
from pathlib import Path

import jax

from blindsight_cli.errors import ExitCode, IncompatibleError
from blindsight_cli.folders import check_family
from blindsight_cli.output import note, print_json, results
from jax_blindsight.checkpoint import CONFIG, MANIFEST, check_target
from jax_blindsight.params import load, save
from jax_blindsight.tensor_files import INDEX
from shared_profiles.lookup import FILE_NAME

# What a processor and a tokenizer are made of; the files that are written anew, or whose weights are, stay behind.
_COPIED, _LEFT = (".json", ".jinja", ".txt", ".model"), {CONFIG, MANIFEST, INDEX, FILE_NAME}


def run_convert(*, checkpoint: Path, out: Path, dtype: str, profile: Path | None, as_json: bool) -> int:
    """Converts; the folder also gets the profile and the files of the processor, so that it stands alone.

    Args:
        checkpoint: a checkpoint folder.
        out: the new folder.
        dtype: of the weights.
        profile: the profile; default: the one that is found for this very model, if any.
        as_json: print a JSON document instead of text.

    Returns:
        The exit code.

    Raises:
        IncompatibleError: the model is not supported.
        ProfileError: the profile is damaged or belongs to another model.
        ValueError, OSError: not a whole checkpoint, or OUT cannot be written.
    """
    check_family(checkpoint)
    check_target(out)
    begun = time.perf_counter()
    try:
        params = load(checkpoint, profile, dtype=dtype)
    except NotImplementedError as error:
        raise IncompatibleError(f"{checkpoint}: {error}") from error
    leaves = jax.tree.leaves(params)
    nbytes = sum(leaf.nbytes for leaf in leaves)
    loaded = time.perf_counter() - begun
    files = sorted(path for path in checkpoint.iterdir() if path.suffix in _COPIED and path.name not in _LEFT)
    save(params, out, beside=[path for path in files if path.is_file()])
    seconds = time.perf_counter() - begun
    if as_json:
        print_json(
            {
                "checkpoint": str(checkpoint),
                "out": str(out),
                "family": params.config.family,
                "dtype": leaves[0].dtype.name,
                "parameters": sum(leaf.size for leaf in leaves),
                "bytes": nbytes,
                "digest": params.fingerprint.digest,
                "has_profile": params.profile is not None,
                "convert_seconds": round(loaded, 3),
                "seconds": round(seconds, 3),
            }
        )
        return ExitCode.OK
    results().print(
        f"saved {out}: {params.config.family}, {len(leaves)} weights, {nbytes / 1e6:.0f} MB of {leaves[0].dtype.name}; "
        f"read and converted in {loaded:.1f} s, written in {seconds - loaded:.1f} s",
        markup=False,
        soft_wrap=True,
    )
    if params.profile is None:
        note("without a profile: make one with `blindsight calibrate`, and convert with --profile")
    return ExitCode.OK
