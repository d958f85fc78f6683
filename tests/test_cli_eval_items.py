"""Items and samples by themselves: what an answer is taken for, what a file must hold, what is never written over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from blindsight_cli.evaluation.items import LETTERS_INSTRUCTION, Item, about, digest, normal, read_items
from blindsight_cli.evaluation.result import FORMAT, check_unused, print_summary, summarize
from blindsight_cli.evaluation.samples import Arm, Sample, SampleFile
from blindsight_cli.evaluation.statistics import PairedCounts, wilson
from blindsight_cli.prompt_file import Prompt

RUN = {"items": "sha256:1", "timed": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, *lines: dict | str) -> Path:
    path = folder / "items.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def line(**changes: object) -> dict:
    return {"images": ["a.png", "b.png"], "question": "Same?", "answer": "yes", **changes}


def item(answer: str, *options: str) -> Item:
    return Item(Prompt(1, (), "?", answer, options), normal(answer))


VERDICTS = [
    (("red", "Blue car"), "blue  car.", "blue car"),
    (("red", "Blue car"), "B", "blue car"),
    (("red", "Blue car"), "(B)", "blue car"),
    (("red", "Blue car"), "B. because it is", "blue car"),
    (("red", "Blue car"), "**Red**", "red"),
    (("red", "Blue car"), "C", None),
    (("red", "Blue car"), "b", None),
    (("red", "Blue car"), "A red car", None),
    (("red", "Blue car"), "redder", None),
    (("red", "Blue car"), "", None),
    (("B", "A"), "A", "a"),  # an option's text before an option's letter
    (("1", "-1"), "-1", "-1"),
    (("?", "!"), "!", "!"),
    ((), " The  Cat. ", "the cat"),
    ((), "Stra\N{LATIN SMALL LETTER SHARP S}e", "strasse"),
    ((), "", None),
    ((), " \n", None),
]


@pytest.mark.parametrize(("options", "answer", "verdict"), VERDICTS)
def test_what_an_answer_is_taken_for(options: tuple[str, ...], answer: str, verdict: str | None) -> None:
    assert item("x", *options).verdict(answer) == verdict


@given(st.lists(st.text("abc", min_size=2, max_size=4), min_size=2, max_size=6, unique=True), st.data())
def test_text_and_letter_name_the_same_option(options: list[str], data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(options) - 1))
    letter = "ABCDEF"[i]
    one = item("x", *options)
    forms = (options[i], options[i].upper(), f" {options[i]}.", letter, f"({letter})", f"{letter}) {options[i]}")
    assert {one.verdict(form) for form in forms} == {options[i]}


def test_letters_are_appended_only_where_there_are_options() -> None:
    asked = item("red", "red", "blue").question(letters=True)
    assert asked == f"?\nA. red\nB. blue\n{LETTERS_INSTRUCTION}"
    assert item("red", "red", "blue").question(letters=False) == item("red").question(letters=True) == "?"


def test_items_are_read_with_their_answers(folder: Path) -> None:
    path = write(folder, line(), line(options=["no", "Yes"], answer="B", kind="ignored"), "", line(images=["a.png"]))
    first, second, third = read_items(path)
    assert (first.expected, second.expected, second.prompt.options) == ("yes", "yes", ("no", "Yes"))
    assert [i.prompt.line for i in (first, second, third)] == [1, 2, 4] and len(third.prompt.images) == 1
    assert len(read_items(path, 2)) == 2


BAD = {
    "no-answer": ({"answer": None}, 'must have an "answer"'),
    "empty-answer": ({"answer": " "}, 'must have an "answer"'),
    "half-a-character": ({"answer": "\ud800"}, 'must have an "answer"'),
    "half-an-option": ({"options": ["yes", "\ud800"]}, "two or more"),
    "answer-number": ({"answer": 3}, 'must have an "answer"'),
    "one-option": ({"options": ["yes"]}, "two or more"),
    "blank-option": ({"options": ["yes", " "]}, "two or more"),
    "option-number": ({"options": ["yes", 3]}, "two or more"),
    "alike": ({"options": ["yes", "Yes."]}, "must differ"),
    "no-option": ({"options": ["no", "maybe"]}, "one of the options"),
    "too-many": ({"options": [f"o{i}" for i in range(27)]}, "at most 26"),
    "missing-image": ({"images": ["a.png", "c.png"]}, "c.png"),
    "no-picture": ({"images": ["a.png", "items.jsonl"]}, "must be a picture"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_items_are_named_by_line(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"items.jsonl, line 2.*{message}"):
        read_items(write(folder, line(), line(**changes)))


def test_files_that_show_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r'"answer": "\.\.\."}. Got none'):
        read_items(write(folder, "", ""))
    with pytest.raises(ValueError, match="Got 2 with fewer"):
        read_items(write(folder, line(images=["a.png"]), line(images=[])))


def test_digests_are_of_what_is_seen(folder: Path) -> None:
    """Another file of the same pixels is the same picture; another order, pixel or question is another prompt."""
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    prompt = Prompt(1, (), "Same?")

    def hashed(prompt: Prompt, images: list[Image.Image]) -> str:
        return digest(prompt, about(prompt, images))

    black.save(folder / "c.bmp")
    with Image.open(folder / "c.bmp") as copy:
        assert hashed(prompt, [black, white]) == hashed(prompt, [copy.convert("RGB"), white])
    others = [
        hashed(prompt, [white, black]),
        hashed(prompt, [black]),
        hashed(Prompt(1, (), "Same"), [black, white]),
        hashed(prompt, [black, Image.new("RGB", (4, 16), "white")]),
    ]
    assert len({hashed(prompt, [black, white]), *others}) == 5


def sample(number: int, **changes: object) -> Sample:
    arm = Arm("yes", "yes", 1, "sparse", 60, 10)
    values = dict(
        line=number,
        digest=f"{number:032x}",
        expected="yes",
        n_tokens=40,
        n_images=2,
        dense=Arm("yes", "yes", 1, "dense", 100, 50),
        sparse=arm,
        kl=0.5,
        n_seen=0,
    )
    return Sample(**(values | changes))  # type: ignore[arg-type]


def test_samples_are_kept_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "r.samples.jsonl"
    with SampleFile(path, RUN) as file:
        file.add(sample(1))
        assert path.read_bytes().count(b"\n") == 2, "there at once: the process may be killed"
        file.add(sample(2, seconds=(1.0, 0.5)))
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({*range(1, len(whole), 23), *ends, *(i + 1 for i in ends[:-1])}):  # killed at any moment
        path.write_bytes(whole[:cut])
        with SampleFile(path, RUN) as file:
            known = dict(file.samples)
            for number in {1, 2} - set(known):
                file.add(sample(number, seconds=(1.0, 0.5) if number == 2 else ()))
        assert path.read_bytes() == whole, cut
    with SampleFile(path, RUN) as file:
        assert file.samples == {1: sample(1), 2: sample(2, seconds=(1.0, 0.5))}


def test_foreign_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.samples.jsonl"
    with SampleFile(path, RUN) as file:
        file.add(sample(1))
    good = path.read_bytes()
    head = good.splitlines()[0].decode()
    for content, message in (
        (good, "It is of another: timed: there 3, here 4"),
        (b"my notes", "no line of one"),
        (b"my notes\n", "first line is not one's"),
        (b"[]\n", "first line is not one's"),
        (head.replace('"version": 1', '"version": 2').encode() + b"\n", "version 1"),
        (good + b"{}\n", "line 3 must be an item"),
        (good.replace(b'"kl": 0.5', b'"kl": 1' + 400 * b"0"), "line 2 must be an item.*kl must be a finite number"),
        (good + good.splitlines()[1] + b"\n", "the item of line 1 must be there once"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            SampleFile(path, RUN | {"timed": 4} if "timed" in message else RUN)
        assert path.read_bytes() == content
    path.write_bytes(good)
    for run, message in ((RUN | {"new": 1}, "new: there None, here 1"), ({}, "items: .*; timed: there 3, here None")):
        with pytest.raises(ValueError, match=f"It is of another: {message}"):
            SampleFile(path, run)


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SampleFile(tmp_path / "s.jsonl", RUN) as file:
        file._file.close()
        file._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115  # closed with the other
        with pytest.raises(OSError, match=r"No space left on device: '.*s\.jsonl'"):
            file.add(sample(1))
        monkeypatch.setattr(file, "_file", SimpleNamespace(write=lambda line: len(line) - 1, close=file._file.close))
        with pytest.raises(OSError, match=r"s\.jsonl could not be written whole"):
            file.add(sample(1))


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "r.samples.jsonl"
    code = f"import sys\nfrom blindsight_cli.evaluation.samples import SampleFile\nSampleFile({str(path)!r}, {RUN})"
    with SampleFile(path, RUN):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode and "Another process writes" in done.stderr


def test_results_are_only_written_over_by_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    check_unused(path, RUN)
    for text, fine in ((json.dumps({"format": FORMAT, "run": RUN}), True), ("{}", False), ("notes", False)):
        path.write_text(text)
        if fine:
            check_unused(path, RUN)
            with pytest.raises(ValueError, match="the result of this very run"):
                check_unused(path, RUN | {"timed": 4})
        else:
            with pytest.raises(ValueError, match="the result of this very run"):
                check_unused(path, RUN)


def test_a_summary_counts_what_the_samples_say() -> None:
    wrong = Arm("green", None, 0, "dense: fewer than two images", 100, 0)
    figures = summarize(
        [
            sample(1, seconds=(3.0, 1.0)),
            sample(2, kl=0.1, seconds=(1.0, 2.0)),
            sample(3, sparse=Arm("no", "no", 0, "sparse", 100, 50), n_seen=1),
            sample(4, digest=f"{1:032x}", n_images=1, dense=Arm("blue", None, 0, "dense", 100, 0), sparse=wrong),
            sample(5, dense=wrong, sparse=wrong),
        ]
    )
    assert (figures["n_items"], figures["n_multi_image"], figures["n_repeated"]) == (5, 4, 1)
    assert figures["dense"] | {"interval_95": 0} == {"right": 3, "accuracy": 0.6, "interval_95": 0, "invalid": 2}
    assert (figures["sparse"]["right"], figures["sparse"]["invalid"]) == (2, 2)
    difference = figures["difference"]
    assert (difference["only_dense_right"], difference["only_sparse_right"], difference["both_wrong"]) == (1, 0, 2)
    assert difference["sparse_minus_dense"] == pytest.approx(-0.2) and difference["mcnemar_exact_p"] == 1.0
    assert figures["agreement"] == 0.6  # two wrong texts agree if they are the same text
    assert figures["kl_nats"] == pytest.approx({"mean": 0.42, "median": 0.5, "max": 0.5})
    assert figures["kept_flops"] == pytest.approx((2 * 60 + 300) / 500)
    assert figures["kept_inter_image_flops"] == pytest.approx(70 / 150)
    assert figures["effective_share"] == 0.4  # the third was sparse, and dropped nothing
    assert figures["ran"] == {"sparse": 3, "dense: fewer than two images": 2}
    assert figures["prefill"] == {"n": 2, "dense_seconds": 2.0, "sparse_seconds": 1.5, "ratio": 1.75}
    assert figures["n_with_calibration_pictures"] == 1 and figures["marks"] == []


def test_a_summary_is_told_with_every_figure_in_its_column(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Arm("no", "no", 0, "sparse", 60, 10)
    lost = [sample(i, sparse=wrong, kl=0.1) for i in (1, 2, 3)]
    won = sample(4, dense=Arm("", None, 0, "dense", 100, 50), seconds=(3.0, 2.0))
    print_summary(summarize([*lost, won, *(sample(i, kl=0.1) for i in range(5, 11))]))
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    low, high = PairedCounts(6, 3, 1, 0).interval()
    intervals = [f"{100 * low:.1f}% to {100 * high:.1f}%" for low, high in (wilson(9, 10), wilson(7, 10))]
    assert said == [
        "dense sparse",
        "accuracy 90.0% 70.0%",
        f"95% interval {' '.join(intervals)}",
        "invalid answers 1 0",
        "prefill, median 3.00 s 2.00 s",
        "",
        "10 items, 10 with several images",
        f"sparse - dense: \N{MINUS SIGN}20.0 points, 95% interval \N{MINUS SIGN}{-100 * low:.1f} to +{100 * high:.1f}; "
        "3 only dense right, 1 only sparse; McNemar p = 0.62",
        "same answer 60.0%, KL of the first token 0.14 nats",
        "attention FLOPs kept 60.0%, between images 20.0%",
        "sparsity did something on 100.0% of the items",
        "prefill dense / sparse: 1.50\N{MULTIPLICATION SIGN} (median of 1 items)",
    ]


def test_figures_that_say_nothing_are_marked() -> None:
    dense = Arm("green", None, 0, "dense", 100, 50)
    marks = summarize([sample(1, dense=dense, sparse=dense)])["marks"]
    assert [mark.split(":")[0] for mark in marks] == [
        "sparsity did nothing on any item",
        "dense gave no right answer (1 invalid)",
        "sparse gave no right answer (1 invalid)",
    ]
