"""The commands that need no checkpoint, or hardly: help, profile, doctor, report, and how errors end."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from blindsight_cli import errors, main
from blindsight_cli.commands import bench, demo, doctor
from blindsight_cli.main import app
from blindsight_cli.report import CurveRow, ModelInfo, ReportData, TemplateInfo
from shared_profiles import Category
from shared_profiles.budget import Budget
from shared_profiles.classifier import Thresholds
from shared_profiles.profile import CurvePoint, Fingerprint, Profile, ProfileMismatchError, Provenance
from shared_profiles.split import HELD_OUT
from shared_profiles.statistics import PromptStatistics, Statistics
from shared_profiles.template import SinkTemplate
from tiny_checkpoints import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PRINT = Fingerprint("qwen2_5_vl", 2, 4, 2, 16, "sha256:" + "5e" * 32)


def blindsight(*args: object) -> Result:
    """Runs the command in this process; anything but an exit is raised."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    if "--json" in args and result.exit_code in (0, 1):
        json.loads(result.stdout)  # one document and nothing else
    return result


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile with everything in it."""
    statistics = Statistics(2, 4)
    mass = np.linspace(0.1, 0.9, 24).reshape(3, 2, 4)
    pairs = np.outer([10, 3, 4, 5], [100, 100])
    statistics.add("a", PromptStatistics(100, 2, 50, mass, 1 - mass, pairs))
    made = Profile(
        categories=np.array([[0, 1, 2, 3], [3, 3, 0, 0]]),
        template=SinkTemplate(),
        fingerprint=PRINT,
        summary=statistics.summarize(),
        choice=Thresholds().to_choice(),
        provenance=Provenance("puzzles [a]", "sha256:d4", 1, 1234, "2026-11-21T03:40:49Z", {"torch": "2.11.0"}),
        curve=(CurvePoint(0.4, 0.0021, 0.92),),
    )
    made.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


def test_help_names_every_command_and_the_exit_codes() -> None:
    out = blindsight("--help").stdout
    for name in ("demo", "doctor", "calibrate", "run", "bench", "report", "profile", "Exit codes"):
        assert name in out
    assert blindsight().stdout.split() == out.split()  # typed alone, it helps


def test_version() -> None:
    assert blindsight("--version").stdout.startswith("blindsight")


def test_help_states_the_defaults_of_the_library() -> None:
    options = inspect.signature(main.calibrate, eval_str=True).parameters

    def told(name: str) -> float:
        return float(options[name].annotation.__metadata__[0].show_default)

    assert Thresholds(*(told(name) for name in Thresholds.__dataclass_fields__)) == Thresholds()
    assert told("budget") == Budget().kl and told("held_out") == HELD_OUT
    assert {options[name].default for name in ("budget", "held_out")} == {None}, "the library's"
    assert told("local_block") == SinkTemplate().local_block


@pytest.mark.parametrize(
    "args",
    [
        ["nosuch"],
        ["profile", "show"],
        ["profile", "show", "missing.json"],
        ["bench", "nosuch"],
        ["run", "x"],
        ["demo", "--calibration-prompts", "15"],
    ],
)
def test_usage_errors_exit_with_2(args: list[str]) -> None:
    result = blindsight(*args)
    assert (result.exit_code, result.stdout) == (2, "")


def test_show(profile: Path) -> None:
    out = blindsight("profile", "show", profile).stdout
    for text in (PRINT.digest, "puzzles [a]", "1,234 tokens", "gamma_dense 0.9", "0.0021", "92.0%"):
        assert text in out, text
    assert re.search(r"^ +0 +DS IB +1 +1 +1 +1 *$", out, re.M), out
    assert re.search(r"^ +all +3 +3 +1 +1 *$", out, re.M), out


def test_show_json(profile: Path) -> None:
    shown = json.loads(blindsight("profile", "show", profile, "--json").stdout)
    assert shown["counts"] == {"DENSE": 3, "SINK": 1, "INTRA_IMAGE": 1, "INTRA_IMAGE_SINK": 3}
    assert shown["categories"][0] == ["DENSE", "SINK", "INTRA_IMAGE", "INTRA_IMAGE_SINK"]
    assert shown["statistics"]["SINK"]["kept"] == 0.3
    assert shown["provenance"]["dataset"] == "puzzles [a]"


def test_show_of_a_profile_made_by_hand(tmp_path: Path) -> None:
    Profile.uniform(Category.SINK, PRINT).save(tmp_path / "p.json")
    result = blindsight("profile", "show", tmp_path / "p.json")
    assert result.exit_code == 0 and "manual" in result.stdout
    assert json.loads(blindsight("profile", "show", tmp_path / "p.json", "--json").stdout)["statistics"] is None


def test_validate(profile: Path) -> None:
    assert blindsight("profile", "validate", profile).exit_code == 0
    assert json.loads(blindsight("profile", "validate", profile, "--json").stdout)["valid"] is True
    profile.write_text(profile.read_text().replace('"DENSE",', '"SINK",'))
    result = blindsight("profile", "validate", profile)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "checksum" in result.stderr and "Traceback" not in result.stderr


def test_a_closed_standard_output_is_no_error(profile: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout", None)  # what Python makes of `blindsight profile show FILE >&-`
    with pytest.raises(SystemExit) as stop:
        app(["profile", "show", str(profile)])
    assert stop.value.code == 0


def test_signs_that_a_terminal_lacks_are_written_plainly() -> None:
    """Not as question marks: a minus would be lost, and the doctor's marks would be alike."""
    code = (
        "from blindsight_cli.output import never_fail_on_signs\n"
        "from blindsight_cli.report.figures import nats, points, ratio\n"
        "never_fail_on_signs()\n"
        f"print(points(-0.017), nats(1.2e-7), ratio(2.7), {'✓ ✗ · é'!a})"
    )
    told = {}
    for encoding in ("ascii", "latin-1", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60, check=True)
        told[encoding] = done.stdout.decode(encoding).strip()
    assert told["ascii"] == "-1.7 1.2.10^-7 2.70x + x . ?"
    assert told["latin-1"] == "-1.7 1.2·10^-7 2.70× + x · é"
    assert told["utf-8"] == "\N{MINUS SIGN}1.7 1.2·10⁻⁷ 2.70× ✓ ✗ · é"


def test_diff(profile: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    Profile.uniform(Category.SINK, PRINT).save(other)
    assert blindsight("profile", "diff", profile, profile).exit_code == 0
    result = blindsight("profile", "diff", profile, other)
    assert result.exit_code == 1
    assert "layer 0, head 0: DENSE -> SINK" in result.stdout and "choice.method: thresholds -> manual" in result.stdout
    found = json.loads(blindsight("profile", "diff", profile, other, "--json").stdout)
    assert not found["same"] and len(found["heads"]) == 7
    assert found["fields"]["choice.method"] == ["thresholds", "manual"]


def test_diff_of_other_shapes_is_refused(profile: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    Profile.uniform(Category.SINK, Fingerprint("gemma3", 3, 4, 2, 16, PRINT.digest)).save(other)
    assert blindsight("profile", "diff", profile, other).exit_code == 3


def test_demo_says_what_was_held_out_and_names_as_they_are(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "_LONG_PROMPT", (3, 64))
    model, out = tmp_path / "tiny[v2]", tmp_path / "page[bold].html"
    model.symlink_to(demo.SHIPPED_MODEL)
    result = blindsight("demo", "--model", model, "--out", out, "--questions", 2, "--calibration-prompts", 16)
    told = " ".join(result.stdout.split())
    assert result.exit_code == 0 and "tiny[v2]: " in told and "measured on 4 of them, held out" in told
    assert f"report: {out}" in result.stdout


def test_report(profile: Path, tmp_path: Path) -> None:
    data = ReportData(ModelInfo("m", "qwen2_5_vl", 1, 2, 1, 8, 99), (("DENSE", "SINK"),), TemplateInfo((0,), (1,), 8))
    saved, out = tmp_path / "results.json", tmp_path / "report.html"
    saved.write_text(json.dumps(data.to_json()))
    assert str(out) in blindsight("report", saved, "--out", out).stdout
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert json.loads(blindsight("report", saved, "--out", out, "--json").stdout) == {"report": str(out)}
    assert blindsight("report", saved, "--out", tmp_path / "no" / "report.html").exit_code == 2
    result = blindsight("report", saved, "--out", saved)
    assert result.exit_code == 2 and "--out must name a file of its own" in result.stderr
    assert json.loads(saved.read_text()) == data.to_json()
    for command in (("report", saved), ("demo",)):
        result = blindsight(*command, "--out", profile)
        assert result.exit_code == 2 and "over an HTML page only" in result.stderr
    assert blindsight("bench", "--out", profile).exit_code == 2
    (tmp_path / "empty").touch()
    assert blindsight("report", saved, "--out", tmp_path / "empty").exit_code == 0
    curve = CurveRow(0.5, 1e308, None, None, None, None, chosen=True)
    edited = [
        {**data.to_json(), "budget": 10**400},
        {**data.to_json(), "curve": [curve.to_json()]},
        {**data.to_json(), "budget": -1.0},
    ]
    deep = "[" * 200_000
    for text in ("{", '{"format": "blindsight-report", "version": 99}', "[]", deep, *map(json.dumps, edited)):
        saved.write_text(text)
        result = blindsight("report", saved, "--out", out)
        assert result.exit_code == 2 and str(saved) in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 2),
        (FileNotFoundError(2, "x"), 2),
        (errors.IncompatibleError("x"), 3),
        (ProfileMismatchError("x"), 3),
        (ModuleNotFoundError("x", name="torchvision.io"), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_expected_errors_are_told_without_a_traceback(error: Exception, code: int, capsys, monkeypatch) -> None:
    def command() -> int:
        raise error

    with pytest.raises(errors.typer.Exit) as stop:
        errors.guarded(command)()
    assert stop.value.exit_code == code
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and "Traceback" not in said.err and not said.out
    monkeypatch.setenv(errors.TRACEBACK, "1")
    with pytest.raises(type(error)):
        errors.guarded(command)()


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyError("x"), ModuleNotFoundError("x", name="nosuch")])
def test_unexpected_errors_keep_their_traceback(error: Exception) -> None:
    def command() -> int:
        raise error

    with pytest.raises(type(error)):
        errors.guarded(command)()


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\nfrom blindsight_cli.main import main\nsys.argv[1:] = sys.argv[1:]\n"
    )
    command = [sys.executable, "-c", code + "main()", "bench", "plan"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3, done.stderr
    assert "needs torch" in done.stderr and "source folder: pip install '.[torch]'" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['typer'] = None\nimport blindsight_cli.main"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3 and "source folder: pip install '.[cli]'" in done.stderr


def test_a_scheduler_ends_a_command_as_ctrl_c_does() -> None:
    """So what was measured is kept, and what is half written goes."""
    code = (
        "import os, signal\nfrom blindsight_cli import main\n"
        "def command(**_):\n    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n        signal.pause()\n"
        "    except KeyboardInterrupt:\n        print('kept')\n"
        "main.app = command\nmain.main()"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, timeout=60) == "kept\n"


def checks(*args: object) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code of the doctor, and its findings by name."""
    result = blindsight("doctor", *args, "--json")
    document = json.loads(result.stdout)
    assert document["exit_code"] == result.exit_code and document["ok"] == (result.exit_code == 0)
    return result.exit_code, {check["name"]: check for check in document["checks"]}


def test_doctor_finds_nothing_here() -> None:
    code, found = checks()
    assert code == 0, found
    assert {"torch", "package names", "processors", "attention functions", "a patch takes", "gpu"} <= set(found)
    text = blindsight("doctor").stdout
    assert "all is well" in text and "✓  a patch takes" in text


def test_doctor_asks_for_the_versions_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["torch"]]
    assert dict(entry.split(">=") for entry in needed) == doctor.MINIMUM
    for_jax = {**doctor.MINIMUM, **doctor.MINIMUM_JAX}
    assert all(
        for_jax[name] == least for name, least in (x.split(">=") for x in project["optional-dependencies"]["jax"])
    )
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.PYTHON))


@pytest.mark.parametrize(("version", "code", "status"), [("2.9.1+cu128", 3, "incompatible"), (None, 1, "failed")])
def test_doctor_on_a_bad_torch(version: str | None, code: int, status: str, monkeypatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == "torch" else real(name))
    given, found = checks()
    assert given == code and found["torch"]["status"] == status and "pip install" in found["torch"]["advice"]
    assert found["a patch takes"]["status"] == "skipped"
    assert "1 problem" in blindsight("doctor").stdout


def test_doctor_on_an_old_jax(monkeypatch) -> None:
    found: dict[str, str | None] = {**doctor.MINIMUM, **doctor.MINIMUM_JAX, "jax": "0.4.1", "flax": None}
    monkeypatch.setattr(doctor, "_version", found.get)
    checked = {check.name: check for check in doctor.check_versions()}
    assert checked["jax"].status == "incompatible" and "jax>=0.11.2" in checked["jax"].advice
    assert checked["flax"].status == "info" and "--backend jax" in checked["flax"].detail
    found["jax"], found["ml-dtypes"] = None, "0.1"
    assert {check.status for check in doctor.check_versions()} == {"ok", "info"}


@pytest.mark.parametrize("inside", [True, False], ids=["our-folder", "a-stranger"])
def test_doctor_sees_a_package_called_kernels(inside: bool, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "kernels"
    (folder / "blindsight_kernels" if inside else folder).mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(doctor.Failed, match="Hugging Face package" if inside else "not the one") as failed:
        doctor.check_names()
    assert failed.value.advice


def test_doctor_sees_a_second_copy_of_us(tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(ROOT / "shared_profiles", tmp_path / "shared_profiles")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(doctor.Failed, match="more than once"):
        doctor.check_names()


def test_doctor_sees_functions_that_are_not_ours(monkeypatch) -> None:
    monkeypatch.setattr("torch_blindsight.attention.registered", lambda: False)
    code, found = checks()
    assert code == 1 and found["attention functions"]["status"] == "failed" and found["attention functions"]["advice"]


def test_doctor_sees_a_patch_that_does_not_take(monkeypatch) -> None:
    from torch_blindsight.prompts import Dense

    def refuse(*_: object) -> None:
        raise Dense("on purpose")

    monkeypatch.setattr("torch_blindsight.handle.worth_it", refuse)
    code, found = checks()
    assert code == 1 and "on purpose" in found["a patch takes"]["detail"] and found["a patch takes"]["advice"]


def test_doctor_looks_at_a_checkpoint(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    code, found = checks(folder)
    assert code == 0 and "qwen2_5_vl, 6 layers of 8 heads" in found["checkpoint"]["detail"]
    assert found["its profile"]["status"] == "info" and "calibrate" in found["its profile"]["detail"]
    (folder / "blindsight_profile.json").mkdir()  # as any file that cannot be read
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    code, found = checks(folder)
    assert "tokenizer that does not know <|image_pad|>" in found["its processor"]["detail"]
    assert code == 1 and "Is a directory" in found["its profile"]["detail"]
    (folder / "blindsight_profile.json").rmdir()
    Profile.uniform(Category.SINK, PRINT).save(folder / "blindsight_profile.json")
    (folder / "processor_config.json").unlink()
    code, found = checks(folder)
    assert code == 3 and "n_layers" in found["its profile"]["detail"] and found["its profile"]["advice"]
    assert found["its processor"]["status"] == "failed"
    (folder / "config.json").write_text('{"model_type": "llama"}')
    code, found = checks(folder)
    assert code == 3 and "'llama'" in found["checkpoint"]["detail"]
    assert checks(tmp_path / "nothing")[0] == 1


@pytest.mark.parametrize("what", [[], ["jax-decode"]])
def test_bench_without_jax_measures_nothing_first(what, monkeypatch):
    """Of `all` it had lost the figures of several minutes."""
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "BENCHMARKS", {"attention": pytest.fail, "jax-decode": pytest.fail})
    result = blindsight("bench", *what)
    assert result.exit_code == 3 and "this command needs jax, which is not installed" in " ".join(result.stderr.split())
