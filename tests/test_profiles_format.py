"""The profile format: damaged, edited and wrong files are refused by message, and the published pages are right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import shared_profiles
from profile_strategies import plain_profile, profiles
from shared_profiles import _profile_json as form
from shared_profiles.categories import Category
from shared_profiles.classifier import Thresholds, classify
from shared_profiles.profile import Profile, ProfileError, reseal

PACKAGE = Path(shared_profiles.__file__).parent
SCHEMA = json.loads((PACKAGE / "profile.schema.json").read_text())
PAGE = (PACKAGE / "FORMAT.md").read_text()
EXAMPLE = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1]


def sealed(document: dict[str, Any]) -> str:
    """The text of a document, with the checksum that belongs to it."""
    return form.canonical({**document, "checksum": form.checksum(document)})


# --- loading what save did not write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be whole JSON"),
        (plain_profile().to_json()[:-40], "must be whole JSON.*cut off"),
        ("\x00\x01", "must be whole JSON"),
        (b"\xff\xfe\x00", "must be whole JSON"),
        ("[" * 100_000, "must be whole JSON"),
        ("1" * 5000, "must be whole JSON"),
        ("[]", "must be a JSON object. Got list"),
        ("{}", "schema must be 'blindsight.profile/4'. Got None: not a BlindSight profile. Check the path"),
        ('{"schema":"duo.profile/1"}', "not a BlindSight profile"),
        ('{"schema":"blindsight.profile/5"}', "newer format. Install a newer BlindSight"),
        ('{"schema":"blindsight.profile/3"}', "older format. Run calibrate again"),
        ('{"schema":"blindsight.profile/4"}', "checksum must be 'sha256:.*Got None: the file was edited or damaged"),
        ('{"schema":1,"schema":2}', r"free of repeated keys. Got \['schema'\]"),
        ('{"schema":NaN}', "schema must be free of NaN and infinities. Got nan"),
        ('{"schema":1e999}', "schema must be free of NaN and infinities. Got inf"),
        ('{"curve":[{},{"kl":-Infinity}]}', r"curve\[1\]\.kl must be free of NaN and infinities. Got -inf"),
        ("NaN", "a profile must be free of NaN and infinities"),
    ],
)
def test_what_is_no_profile_is_refused(text, message):
    with pytest.raises(ProfileError, match=message):
        Profile.from_json(text)


def test_every_cut_of_a_file_is_refused():
    text = plain_profile().to_json()
    for length in range(0, len(text) - 2, 97):
        with pytest.raises(ProfileError):
            Profile.from_json(text[:length])


def test_an_edited_file_is_refused_until_resealed():
    text = plain_profile().to_json()
    edited = text.replace('"local_block":128', '"local_block":64')
    with pytest.raises(ProfileError, match=r"checksum must be.*edited or damaged. Run calibrate again.*reseal"):
        Profile.from_json(edited)
    profile = Profile.from_json(reseal(edited))
    assert profile.template.local_block == 64
    assert reseal(text) == text
    assert reseal(json.dumps(json.loads(edited), indent=1)) == profile.to_json()
    with pytest.raises(ProfileError, match=r"template: local_block must be .* Got 63"):
        reseal(edited.replace(":64}", ":63}"))


def test_load_names_the_file(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text("{")
    with pytest.raises(ProfileError, match=r"profile\.json: a profile must be whole JSON"):
        Profile.load(path)
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "absent.json")


def put(*path: Any) -> Callable[[dict], None]:
    """An edit: sets the value at a path of keys, the last argument being the value."""
    *keys, last, value = path

    def edit(document: dict) -> None:
        for key in keys:
            document = document[key]
        document[last] = value

    return edit


def drop(*path: Any) -> Callable[[dict], None]:
    *keys, last = path

    def edit(document: dict) -> None:
        for key in keys:
            document = document[key]
        del document[last]

    return edit


MASS = ("statistics", "mass", "SINK", 0, 1)
# (edit, message, whether the JSON Schema sees it too)
EDITS = [
    (put("categories", 0, 1, "SPARSE"), r"categories\[0\]\[1\] must be one of DENSE, SINK, .* Got 'SPARSE'", True),
    (put("categories", 0, 1, 1), r"categories\[0\]\[1\] must be one of DENSE", True),
    (drop("categories", 0, 1), r"categories must be a table whose rows are equally long. Got .*\[2, 3\]", False),
    (drop("categories", 1), r"categories must have shape \(n_layers, n_heads\)=\(2, 3\). Got \(1, 3\)", False),
    (put("categories", []), "categories must have shape", True),
    (put("categories", "DENSE"), "categories must be a list", True),
    (put("model", "n_layers", 3), "categories must have shape", False),
    (put("model", "n_layers", 2.0), "model.n_layers must be an integer", False),
    (put("model", "n_layers", True), "model.n_layers must be an integer", True),
    (put("model", "n_heads", 0), "model: n_heads must be a positive integer", True),
    (put("model", "n_kv_heads", 2), "model: n_kv_heads must divide n_heads", False),
    (put("model", "digest", "sha256:5E"), "model: digest must be", True),
    (drop("model", "family"), "model must be an object with the keys family, .* Got 'none of family'", True),
    (put("model", "depth", 2), "model must be an object with only the keys .* Got 'also depth'", True),
    (put("model", None), "model must be an object. Got None", True),
    (put("template", "from_start", [-1]), r"template: from_start must hold distinct offsets of at least 0", True),
    (put("template", "from_start", [1, 1]), r"template: from_start must hold distinct offsets", True),
    (put("template", "from_end", [0]), r"template: from_end must hold distinct offsets of at least 1", True),
    (put("template", "from_end", [1.5]), r"template.from_end\[0\] must be an integer", True),
    (put("template", "from_end", [2**31]), r"template: from_end must .* below 2\^31. Got \(2147483648,\)", True),
    (put("template", "from_end", [10**400]), r"template.from_end\[0\] must be an integer below 2\^53", True),
    (put("template", "local_block", 0), r"template: local_block must be a positive multiple of 8, .* Got 0", True),
    (put("template", "local_block", -8), r"template: local_block must be a positive multiple of 8", True),
    (put("template", "local_block", 2**31), r"template: local_block must be .* below 2\^31", True),
    (put("template", "local_block", 100), r"template: local_block must be a positive multiple of 8", True),
    (put("choice", []), "choice must be a dict", True),
    (put("choice", "method", "luck"), "choice must be a dict whose 'method' is one of", True),
    (drop("choice", "method"), "choice must be a dict whose 'method' is one of", True),
    (put("provenance", "created", "yesterday"), "provenance: created must be a UTC time", True),
    (put("provenance", "n_prompts", -1), "provenance: n_prompts must be a positive integer", True),
    (put("provenance", "versions", {"torch": 2}), "provenance.versions.torch must be a string", True),
    (put("provenance", "versions", []), "provenance.versions must be an object", True),
    (put("provenance", []), "provenance must be an object", True),
    (put(*MASS, 2, 1.5), r"statistics: mass\[SINK\] must be in \[0, 1\]. Got 1.5 at layer 0, head 1", True),
    (put(*MASS, 0, -0.5), r"statistics: mass\[SINK\] must be in \[0, 1\]. Got -0.5 at layer 0, head 1", True),
    (put(*MASS, [0.3, 0.2, 0.4]), r"statistics: mass\[SINK\] must not fall .* Got 0.3, 0.2 at layer 0, head 1", False),
    (put(*MASS, [0.3, 0.4]), r"statistics.mass.SINK must be a table whose rows are equally long", False),
    (put(*MASS, ["0.3", 0.4, 0.5]), r"statistics.mass.SINK must be an integer", True),
    (put(*MASS, [None, 0.4, 0.5]), r"statistics.mass.SINK must be an integer", True),
    (put(*MASS, 0.5), r"statistics.mass.SINK must be lists of numbers nested 3 deep", True),
    (drop(*MASS[:4]), r"statistics: mass\[INTRA_IMAGE\] must have shape \(1, 3, 3\). Got \(2, 3, 3\)", False),
    (put("statistics", "error", "SINK", 0, 1, 0, -0.1), r"statistics: error\[SINK\] must be finite and at le", True),
    (put("statistics", "error_mean", "SINK", 0, 1, -0.1), r"statistics: error_mean\[SINK\] must be finite", True),
    (put("statistics", "mass_mean", "SINK", 0, 1, 10**300), r"statistics.mass_mean.SINK must be an integer bel", True),
    (put("statistics", "mass_mean", "DENSE", []), r"statistics.mass_mean must be an object with only the keys", True),
    (drop("statistics", "mass", "SINK"), r"statistics.mass must be an object with the keys .* 'none of SINK'", True),
    (put("statistics", "kept", "SINK", 1.01), r"statistics: kept\[SINK\] must be in \[0, 1\]", True),
    (put("statistics", "levels", [0.0, 0.5, 0.4]), "statistics: levels must be one or more ascending", False),
    (put("statistics", "levels", [0.0, 0.5, 1.4]), "statistics: levels must be one or more ascending", True),
    (put("statistics", "n_prompts", 0), "statistics: n_prompts must be a positive integer", True),
    (put("curve", 0, "kept", 1.5), r"curve\[0\]: kept must be in \[0, 1\]. Got 1.5", True),
    (put("curve", 0, "kl", -0.1), r"curve\[0\]: kl must be finite and at least 0", True),
    (put("curve", 1, "accuracy", 2), r"curve\[1\]: accuracy must be in \[0, 1\]", True),
    (drop("curve", 1, "accuracy"), r"curve\[1\] must be an object with the keys", True),
    (put("curve", 1, "agreement", -1), r"curve\[1\]: agreement must be in \[0, 1\]", True),
    (put("curve", 1, "n_prompts", 0), r"curve\[1\]: n_prompts must be a positive integer", True),
    (put("curve", 0, "heads", ["DSI", "BXD"]), r"curve\[0\]: heads must be equally long rows", True),
    (put("curve", 0, "heads", ["DSI"]), r"curve\[0\].heads must have shape .*=\(2, 3\). Got \(1, 3\)", False),
    (put("curve", 0, "heads", "DSI"), r"curve\[0\].heads must be a list", True),
    (
        drop("statistics", "pairs", "DENSE"),
        r"statistics.pairs must be an object with the keys .* 'none of DENSE'",
        True,
    ),
    (put("statistics", "pairs", "SINK", [1e9, 1e9]), r"statistics: pairs\[DENSE\] must be more than 0 and at", False),
    (put("statistics", "pairs", "SINK", 1, -1), r"statistics: pairs\[SINK\] must be finite .* Got -1 at layer 1", True),
    (put("statistics", "harm", "luck", {}), r"statistics.harm must be an object with only the keys .*luck", True),
    (put("statistics", "harm", []), "statistics.harm must be an object", True),
    (put("statistics", "harm", "gradient", {}), "statistics.harm.gradient must be an object with the keys", True),
    (put("curve", None), "curve must be a list", True),
    (drop("curve"), "the profile must be an object with the keys .* Got 'none of curve'", True),
    (put("comment", "hello"), "the profile must be an object with only the keys .* Got 'also comment'", True),
]


@pytest.mark.parametrize(("edit", "message"), [e[:2] for e in EDITS], ids=[f"edit{i}" for i in range(len(EDITS))])
def test_a_wrong_value_is_refused_even_with_a_good_checksum(edit, message):
    document = json.loads(plain_profile().to_json())
    edit(document)
    with pytest.raises(ProfileError, match=f"{message}.*Run calibrate again"):
        Profile.from_json(sealed(document))


def test_integers_may_stand_for_floats():
    document = json.loads(plain_profile().to_json())
    document["statistics"]["levels"] = [0, 0.5, 1]
    assert Profile.from_json(sealed(document)) == plain_profile()


# --- the published schema and the format's page


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema", reason="a development dependency, not in every environment")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


@given(profile=profiles())
@settings(max_examples=30)
def test_every_profile_fits_the_schema(validator, profile):
    validator.validate(json.loads(profile.to_json()))


@pytest.mark.parametrize(
    "edit",
    [
        *(edit for edit, _, seen in EDITS if seen),
        put("schema", "blindsight.profile/3"),
        put("checksum", "md5:00"),
        drop("checksum"),
    ],
)
def test_the_schema_sees_damage(validator, edit):
    document = json.loads(plain_profile().to_json())
    validator.validate(document)
    edit(document)
    assert not validator.is_valid(document)


def test_the_schema_names_one_version():
    assert {SCHEMA["$id"].split(":")[-1], SCHEMA["title"].split()[-1]} == {str(form.VERSION)}
    assert SCHEMA["properties"]["schema"]["const"] == form.SCHEMA


def test_the_worked_example_is_a_real_profile(tmp_path, validator):
    path = tmp_path / "example.json"
    path.write_text(EXAMPLE)
    profile = Profile.load(path)
    validator.validate(json.loads(EXAMPLE))
    assert Profile.from_json(profile.to_json()) == profile
    thresholds = Thresholds(**{k: v for k, v in profile.choice.items() if k != "method"})
    np.testing.assert_array_equal(classify(profile.summary, thresholds), profile.categories)
    kept = {Category.DENSE: 1.0, **profile.summary.kept}
    mean = sum(kept[c] * n for c, n in profile.counts().items()) / profile.categories.size
    assert mean == pytest.approx(profile.curve[0].kept)


def test_the_snippets_of_the_format_page_run(tmp_path):
    path = tmp_path / "example.json"
    path.write_text(EXAMPLE)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    read, edit = (compile(snippet, "FORMAT.md", "exec") for snippet in snippets)
    names = {"path": str(path)}
    exec(read, names)
    assert names["profile"]["categories"][1][0] == "DENSE" == Category(Profile.load(path).categories[1, 0]).name
    path.write_text(EXAMPLE.replace('"local_block": 128', '"local_block": 64'))
    with pytest.raises(AssertionError):
        exec(read, names)
    exec(edit, names)
    assert Profile.load(path).template.local_block == 64
