"""The report: one HTML file that shows every figure, loads nothing from outside, and runs only its own script."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from blindsight_cli.report import (
    AccuracyRow,
    CategoryStatistics,
    Example,
    FlopsPoint,
    KindAccuracy,
    Machine,
    MaskExample,
    ModelInfo,
    ReportData,
    ReportProvenance,
    Segment,
    TemplateInfo,
    TimingRow,
    Timings,
    figures,
    render,
    statistics_from_summary,
    write_report,
)
from blindsight_cli.report.data import SPARSE
from shared_profiles.categories import Category
from shared_profiles.layout import Layout, SpecialTokens
from shared_profiles.masks import category_mask
from shared_profiles.summary import LEVELS, Summary
from shared_profiles.template import SinkTemplate

VOID = {"meta", "img", "br", "hr", "link", "input"}
TEMPLATE = SinkTemplate((0, 1), (1, 2), 8)
KINDS = ("color", "shape", "which", "count", "same color", "same shape")


def sample(n_layers: int = 6, n_heads: int = 8, n_kv_heads: int = 4, seed: int = 0) -> ReportData:
    """A report with every section, made of seeded random figures."""
    rng = np.random.default_rng(seed)
    shape = (n_layers, n_heads)
    depth = np.linspace(0.15, 0.85, n_layers)[:, None]
    draws = rng.random(shape)
    names = np.where(draws > depth, "DENSE", np.where(draws > 0.6 * depth, "INTRA_IMAGE_SINK", "INTRA_IMAGE"))
    names = np.where(rng.random(shape) < 0.15, "SINK", names)
    mass = {name: rng.beta(2 + i, 2, shape) for i, name in enumerate(SPARSE)}
    return ReportData(
        model=ModelInfo("blindsight-small", "qwen2_5_vl", n_layers, n_heads, n_kv_heads, 16, 1_402_112),
        categories=tuple(map(tuple, names.tolist())),
        template=TemplateInfo(TEMPLATE.from_start, TEMPLATE.from_end, TEMPLATE.local_block),
        statistics={
            name: CategoryStatistics(m, 0.6 * m, 0.98 * m, np.minimum(1.3 * m, 1), 1.2 * (1 - m), kept)
            for (name, m), kept in zip(mass.items(), (0.21, 0.307, 0.342), strict=True)
        },
        accuracy=tuple(
            AccuracyRow(
                n,
                1200,
                dense,
                sparse,
                agreement,
                kl,
                kept,
                tuple(KindAccuracy(k, 200 + i, 1 - 0.011 * i, 1 - 0.0133 * i) for i, k in enumerate(KINDS)),
            )
            for n, dense, sparse, agreement, kl, kept in (
                (2, 0.9992, 0.9983, 0.9975, 0.000032, 0.713),
                (6, 0.9233, 0.9183, 0.9808, 0.00273, 0.428),
                (12, 0.8742, 0.8658, 0.9617, 0.0118, 0.301),
            )
        ),
        timings=Timings(
            (
                TimingRow("attention of all layers", 2_466, 150, 0.412, 0.171, 9),
                TimingRow("attention of all layers", 9_842, 600, 6.31, 1.87, 5),
                TimingRow("whole prefill", 2_466, 150, 1.234, 1.001, 9),
            ),
            Machine("AMD EPYC 7763", 2, "torch 2.11.0"),
        ),
        flops=tuple(flops_point(n) for n in (2, 4, 8, 16, 32, 64)),
        masks=mask_example(),
        examples=tuple(
            Example(tuple(thumbnail(i, j) for j in range(n)), question, *answers)
            for i, (n, question, answers) in enumerate(
                (
                    (2, "What color is image 2?", ("red", "red", "red")),
                    (6, "Is the color of images 1 and 3 the same?", ("yes", "yes", "no")),
                    (6, "Which image is the first blue circle?", ("4", "2", "4")),
                )
            )
        ),
        provenance=ReportProvenance(
            "synthetic puzzles, seed 7",
            "sha256:" + "0123456789abcdef" * 4,
            96,
            13_728,
            "sha256:" + "fedcba9876543210" * 4,
            {"blindsight": "0.1.0", "torch": "2.11.0", "transformers": "5.17.0", "python": "3.12.3"},
            "2026-11-21T09:30:00Z",
            "blindsight demo --out report.html",
        ),
        chosen_by="Chosen by thresholds on retained mass: 0.95 for every category.",
    )


def flops_point(n_images: int, own: int = 16) -> FlopsPoint:
    """Pairs of a prompt of `n_images` images of `own` tokens, 48 heads, about as a profile keeps them."""
    intra, text = n_images * own * (own + 1) / 2 * 48, n_images * own * 3 * 48
    inter = n_images * (n_images - 1) / 2 * own * own * 48
    return FlopsPoint(n_images, n_images * (own + 3) + 5, intra, inter, text, 0.95 * intra, 0.17 * inter, text)


def mask_example() -> MaskExample:
    """Three images of 16, 24 and 16 tokens with text around them, masked by the definition."""
    parts = [("text", 6), *[("delimiter", 1), ("image", 16), ("delimiter", 1)], ("text", 3)]
    parts += [("delimiter", 1), ("image", 24), ("delimiter", 1), ("text", 2), ("delimiter", 1), ("image", 16)]
    parts += [("delimiter", 1), ("text", 9)]
    ids, images = [], 0
    for i, (kind, length) in enumerate(parts):
        opening = kind == "delimiter" and parts[i + 1][0] == "image"
        ids += [{"text": 1, "image": 2, "delimiter": 3 if opening else 4}[kind]] * length
        images += kind == "image"
    layout = Layout.from_ids(np.array(ids), SpecialTokens(start=3, end=4, image=2))
    assert layout.n_images == images
    masks = {c.name: category_mask(layout, c, TEMPLATE) for c in Category}
    return MaskExample(
        tuple(Segment(*part) for part in parts),
        {name: tuple("".join("01"[int(seen)] for seen in row) for row in mask) for name, mask in masks.items()},
    )


def thumbnail(i: int, j: int) -> str:
    """A plain square as base64 PNG."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), ((70 * i + 40 * j) % 256, (150 * j) % 256, (90 * i) % 256)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


class Page(HTMLParser):
    """Checks that elements nest, and collects elements with their attributes, and the text outside style and script."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.feed(html)
        self.close()
        assert not self.stack
        assert len(set(self.ids)) == len(self.ids)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.fixture(scope="module")
def data() -> ReportData:
    return sample()


@pytest.fixture(scope="module")
def html(data: ReportData) -> str:
    return render(data)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.mark.parametrize(("n_layers", "n_heads", "n_kv_heads"), [(6, 8, 4), (28, 28, 4), (48, 32, 32), (1, 1, 1)])
def test_one_cell_per_head_with_its_category(n_layers: int, n_heads: int, n_kv_heads: int) -> None:
    data = sample(n_layers, n_heads, n_kv_heads)
    page = Page(render(data))
    cells = {
        a["data-at"]: a["class"] for t, a in page.elements if t == "rect" and a.get("class", "").startswith("head ")
    }
    wanted = {f"{i}.{j}": f"head c-{name}" for i, row in enumerate(data.categories) for j, name in enumerate(row)}
    assert cells == wanted
    heat = [a for t, a in page.elements if t == "rect" and a.get("class", "").split()[:1] == ["heat"]]
    assert len(heat) == 3 * n_layers * n_heads


def test_nothing_from_outside(html: str, page: Page) -> None:
    assert "link" not in {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not (tag == "script" and "src" in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            assert attributes.get(name, "#").startswith(("data:image/png;base64,", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttp", html)


def test_every_figure_is_shown(data: ReportData, page: Page) -> None:
    assert data.timings and data.statistics and data.provenance
    wanted = [
        data.model.name,
        data.chosen_by,
        *data.limits,
        "1.40 M parameters",
        "13,728 tokens",
        data.provenance.command,
    ]
    wanted += [
        data.provenance.dataset_hash,
        data.provenance.fingerprint,
        "transformers 5.17.0",
        data.timings.machine.cpu,
    ]
    for row in data.accuracy:
        wanted += [figures.percent(x) for x in (row.dense, row.sparse, row.agreement, row.kept_flops)]
        wanted += [figures.nats(row.kl), figures.count(row.n_questions), figures.points(row.sparse - row.dense)]
        wanted += [figures.percent(x) for kind in row.by_kind for x in (kind.dense, kind.sparse)]
    for timing in data.timings.rows:
        wanted += [
            figures.seconds(timing.dense_seconds),
            figures.seconds(timing.sparse_seconds),
            figures.ratio(timing.ratio),
        ]
        wanted += [timing.what, figures.count(timing.n_tokens)]
    for point in data.flops:
        parts = [getattr(point, f"{side}_{part}") for side in ("dense", "kept") for part in ("intra", "inter", "text")]
        wanted += [
            figures.flops(4 * data.model.head_dim * pairs) for pairs in (*parts, point.dense_total, point.kept_total)
        ]
    for table in data.statistics.values():
        wanted.append(figures.percent(table.kept))
        for field in ("mass_mean", "mass_q05", "mass_q50", "mass_q95", "error_mean"):
            wanted += [figures.two(x) for row in getattr(table, field) for x in row]
    wanted += [text for e in data.examples for text in (e.question, e.expected, e.dense, e.sparse)]
    missing = [text for text in wanted if text not in page.text]
    assert not missing


def test_statistics_table_has_a_row_per_head_and_right_aligned_numbers(html: str, data: ReportData) -> None:
    table = re.search(r'<table class="small sortable">.*?</table>', html, re.S)
    assert table
    rows = re.findall(r"<tr><td.*?</tr>", table.group(), re.S)
    assert len(rows) == 48
    cells = re.findall(r'<td class="num">(.*?)</td>', rows[8 + 3])
    assert cells[:2] == ["1", "3"]
    assert data.statistics
    assert cells[2] == figures.two(data.statistics["INTRA_IMAGE_SINK"].mass_mean[1][3])
    assert len(cells) == 2 + 15


def test_pictures_have_names(page: Page) -> None:
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if tag == "img":
            assert attributes["alt"]


def test_mask_pictures_cover_exactly_the_pairs_of_the_mask(html: str, data: ReportData) -> None:
    assert data.masks
    unit = 460 // data.masks.n_tokens
    drawn = [
        sum(
            int(length)
            for path in re.findall(r' d="([^"]*)" class="p-', svg)
            for length in re.findall(r"h(\d+)v", path)
        )
        for svg in re.findall(r"<svg[^>]*class=\"mask\".*?</svg>", html, re.S)
    ]
    order = ("DENSE", "INTRA_IMAGE_SINK", "INTRA_IMAGE", "SINK")
    assert drawn == [unit * sum(row.count("1") for row in data.masks.masks[name]) for name in order]


def test_text_from_data_is_escaped(data: ReportData) -> None:
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>"\'{{ 7 * 7 }}'
    example = Example((thumbnail(0, 0),), evil, evil, evil, "no")
    assert data.provenance
    origin = dataclasses.replace(data.provenance, command=evil, dataset=evil, versions={evil: evil})
    timings = Timings((TimingRow(evil, 10, 2, 1.0, 0.5, 3),), Machine(evil, 2, evil))
    accuracy = tuple(dataclasses.replace(r, by_kind=(KindAccuracy(evil, 9, 0.5, 0.5),)) for r in data.accuracy)
    model = dataclasses.replace(data.model, name=evil, family=evil)
    html = render(
        dataclasses.replace(
            data,
            examples=(example,),
            provenance=origin,
            timings=timings,
            accuracy=accuracy,
            model=model,
            chosen_by=evil,
            limits=(evil,),
        )
    )
    page = Page(html)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert tags.count("img") == 1
    assert page.text.count(evil) >= 10
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='", html)


def test_json_round_trip_is_exact(data: ReportData) -> None:
    text = json.dumps(data.to_json(), allow_nan=False)
    assert ReportData.from_json(json.loads(text)) == data
    bare = ReportData(data.model, data.categories, data.template)
    assert ReportData.from_json(json.loads(json.dumps(bare.to_json()))) == bare


def test_sections_without_figures_are_left_out(data: ReportData) -> None:
    page = Page(render(ReportData(data.model, data.categories, data.template)))
    assert [a["id"] for tag, a in page.elements if tag == "section"] == ["heads", "limits"]
    links = {a["href"][1:] for tag, a in page.elements if tag == "a"}
    assert links == {"heads", "limits"}


def test_write_report_replaces_the_file_whole(data: ReportData, html: str, tmp_path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(data, path)
    assert path.read_text(encoding="utf-8") == html
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_statistics_come_out_of_a_summary() -> None:
    rng = np.random.default_rng(1)
    mass = {c: np.sort(rng.random((2, 3, len(LEVELS))), axis=-1) for c in Category if c != Category.DENSE}
    means = {c: m.mean(-1) for c, m in mass.items()}
    pairs = {c: np.ones(2) for c in Category}
    summary = Summary(5, LEVELS, mass, means, mass, means, dict.fromkeys(mass, 0.25), pairs)
    statistics = statistics_from_summary(summary)
    assert set(statistics) == set(SPARSE)
    np.testing.assert_array_equal(statistics["SINK"].mass_q05, summary.mass[Category.SINK][..., 1])
    np.testing.assert_array_equal(statistics["SINK"].mass_q95, summary.mass[Category.SINK][..., 19])
    np.testing.assert_array_equal(statistics["INTRA_IMAGE"].error_mean, summary.error_mean[Category.INTRA_IMAGE])


def wrong(path: str, value: object) -> dict:
    """The sample's JSON with one value replaced; `None` removes it."""
    table = json.loads(json.dumps(sample().to_json()))
    at, *keys = (int(key) if key.isdigit() else key for key in path.split("."))
    place = table
    for key in keys:
        place, at = place[at], key
    if value is None:
        del place[at]
    else:
        place[at] = value
    return table


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "profile", r'must have "format": "blindsight-report"'),
        ("version", 2, r"version must be 1\. Got 2"),
        ("model", None, r"Missing: \['model'\]"),
        ("colour", "red", r"unknown: \['colour'\]"),
        ("categories.5", None, r"categories must have shape \(L, H\)=\(6, 8\)\. Got 5 rows"),
        ("categories.2.3", "SPARSE", r"categories\[2\]\[3\] must be one of .* Got 'SPARSE'"),
        ("statistics.SINK.mass_mean.1.7", None, r"statistics\['SINK'\]\.mass_mean must have shape \(L, H\)=\(6, 8\)"),
        ("statistics.SINK.mass_q50.0.0", float("nan"), r"mass_q50\[0\]\[0\] must be a finite number\. Got nan"),
        ("statistics.SINK.mass_q50.0.0", 1.5, r"mass_q50 must lie in \[0\.0, 1\.001\]\. Got 1\.5"),
        ("statistics.DENSE", {}, r"statistics\['DENSE'\] must have the fields"),
        ("accuracy.1.sparse", 91.8, r"accuracy\[1\]: sparse must lie in \[0\.0, 1\.0\]\. Got 91\.8"),
        ("accuracy.1.n_questions", True, r"n_questions must be an integer\. Got True"),
        ("timings.rows.0.sparse_seconds", 0, r"sparse_seconds must be positive\. Got 0\.0"),
        ("flops.0.kept_inter", 1e9, r"flops\[0\]: kept_inter must lie in"),
        ("masks.segments.0.length", 7, r"masks\['DENSE'\] must be \(T, T\)=\(83, 83\).* Got 82 rows of \[82\]"),
        ("masks.segments.0.length", 100, r"number of tokens of a mask picture must lie in \[1, 160\]\. Got 176"),
        ("masks.segments.0.kind", "video", r"kind must be one of .* Got 'video'"),
        ("masks.masks.SINK.0", "x" * 82, r"masks\['SINK'\] must be made of the characters 0 and 1"),
        ("examples.0.images.0", "R0lGODlh", r"images\[0\] must be a PNG file in base64"),
    ],
)
def test_wrong_values_are_named(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReportData.from_json(wrong(path, value))
