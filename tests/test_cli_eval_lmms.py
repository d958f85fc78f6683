"""The plug-in in the real lmms-eval: found by its registry, loaded and patched by its classes, asked as it asks.

lmms-eval brings a hundred packages, some of other versions than ours, so it is installed beside the environment, with
the few of them that its registry and these model classes import:

    pip install --no-deps --target <environment>/lmms-eval -r tests/lmms-eval.txt
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blindsight_cli.backends import load_backend
from shared_profiles import Category
from shared_profiles.profile import Profile
from tiny_checkpoints import save_checkpoint, save_prompts

INSTALLED = Path(sys.prefix) / "lmms-eval"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "gemma3")
PIXELS = 64 * 64


def test_the_entry_point_is_installed() -> None:
    (ours,) = (e for e in importlib.metadata.entry_points(group="lmms_eval.models") if e.name == "blindsight")
    assert ours.value == "blindsight_cli.lmms:manifests" and callable(ours.load())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every class did, lmms-eval's own and ours, in one process; results by job."""
    if not INSTALLED.is_dir():
        assert "BLINDSIGHT_CI" not in os.environ, f"CI must install lmms-eval into {INSTALLED}"
        pytest.skip(f"needs lmms-eval: there is no {INSTALLED}")
    data = save_prompts(tmp_path_factory.mktemp("data"), (2, 3)).parent
    images = [[str(data / f"{row}-{i}.png") for i in range(n)] for row, n in enumerate((2, 3))]
    jobs = {}

    def add(name: str, folder: Path, model: str, more: str = "", simple: bool = True) -> None:
        places = f"pretrained={folder},device=cpu,device_map=cpu,min_pixels={PIXELS},max_pixels={PIXELS}"
        jobs[name] = {"model": model, "simple": simple, "arguments": places + more, "images": images}

    for family in FAMILIES:
        folder = save_checkpoint(tmp_path_factory.mktemp(family), family)
        fingerprint = load_backend("torch", folder).facts.fingerprint
        profiles = {c: folder.with_name(f"{family}-{c.name}.json") for c in (Category.INTRA_IMAGE, Category.DENSE)}
        for category, path in profiles.items():
            Profile.uniform(category, fingerprint).save(path)
        sparse, dense = (f",profile={path}" for path in profiles.values())
        add(f"{family} own", folder, family)
        add(f"{family} sparse", folder, f"blindsight_{family}", sparse)
        if family == "qwen2_5_vl":
            add("chat sparse", folder, "blindsight_qwen2_5_vl", sparse, simple=False)
            add("no profile", folder, "blindsight_qwen2_5_vl")
            add("own, our attention", folder, "qwen2_5_vl", ",attn_implementation=blindsight")
        if family == "gemma3":
            add("all dense", folder, "blindsight_gemma3", dense)
    file = tmp_path_factory.mktemp("jobs") / "jobs.json"
    file.write_text(json.dumps(list(jobs.values())))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("lmms_run.py"), file],
        env=os.environ | {"PYTHONPATH": str(INSTALLED), "BLINDSIGHT_CACHE": str(file.parent)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    out = json.loads(done.stdout.splitlines()[-1])
    return {"models": out["models"], **dict(zip(jobs, out["results"], strict=True))}


def test_its_registry_lists_our_models(told: dict[str, Any]) -> None:
    assert {f"blindsight_{family}" for family in FAMILIES} <= set(told["models"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_through_its_own_class(told: dict[str, Any], family: str) -> None:
    """Two requests of two and three pictures: two sparse prefills, and answers that are not all the dense ones."""
    own, ours = told[f"{family} own"], told[f"{family} sparse"]
    assert own["forwards"] is None and len(own["answers"]) == len(ours["answers"]) == 2
    assert f"lmms_eval.models.simple.{family}" in ours["bases"]
    assert ours["forwards"]["sparse"] == 2 and set(ours["forwards"]) <= {"sparse", "dense: decode step"}


def test_the_profile_decides(told: dict[str, Any]) -> None:
    own, sparse, dense = (told[name] for name in ("gemma3 own", "gemma3 sparse", "all dense"))
    assert dense["answers"] == own["answers"] != sparse["answers"]
    assert dense["forwards"]["dense: all heads are Dense"] == 2


def test_chats_are_asked_of_the_chat_class(told: dict[str, Any]) -> None:
    assert "lmms_eval.models.chat.qwen2_5_vl" in told["chat sparse"]["bases"]
    assert told["chat sparse"]["forwards"]["sparse"] == 2


def test_what_is_refused(told: dict[str, Any]) -> None:
    """Without a profile the first requests would be measured; and the reason why there is a plug-in at all."""
    assert "needs a profile" in told["no profile"]["error"]
    assert "attn_implementation must be one of" in told["own, our attention"]["error"]
