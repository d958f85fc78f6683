"""What scripts/gpu_check.py measures and how its results are told: prompts, peers' masks, cycles, tables and plots."""

from __future__ import annotations

import json
import time
from importlib import import_module

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jax_blindsight.buckets import bucket
from shared_profiles import Category, category_mask
from tree_scripts import ROOT, python

RENDER = ROOT / "scripts" / "render_results.py"
prompts, tables, cycles, measure, peers, models = (
    import_module(f"blindsight_gpu.{name}") for name in ("prompts", "tables", "cycles", "measure", "peers", "models")
)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both-ways"])
@pytest.mark.parametrize("category", list(Category), ids=lambda c: c.name)
def test_peers_get_exactly_our_masks(category, bidirectional):
    layout = prompts.make_layout(prompts.Shape("", 1, 1, 16, 150, bidirectional), 512)
    assert layout.n_images > 2
    table = prompts.row_tables(layout, category, torch.device("cpu"))
    want = category_mask(layout, category, prompts.TEMPLATE)
    np.testing.assert_array_equal(table.visible(torch.arange(512)).numpy(), want)
    partial, full = peers._blocks(table, torch.arange(512))
    blocks = want.reshape(4, 128, 4, 128)
    np.testing.assert_array_equal(full.numpy(), blocks.all((1, 3)))
    np.testing.assert_array_equal((partial | full).numpy(), blocks.any((1, 3)))


def test_dense_heads_are_spread():
    heads = prompts.mixed(28, 0.3)
    assert [i for i, category in enumerate(heads) if category is Category.DENSE] == [0, 3, 7, 10, 14, 17, 21, 24]
    assert set(prompts.mixed(4, 0.0)) == {Category.INTRA_IMAGE_SINK}


def test_full_size_prompts_are_what_they_are_called():
    place = measure.Place(dry_run=False)
    for shape in prompts.shapes(place):
        for n_tokens in prompts.lengths(place).values():
            layout = prompts.make_layout(shape, n_tokens)
            assert layout.n_tokens == n_tokens
            assert layout.n_tokens % 128 == 0
            image_tokens = (layout.images[:, 2] - layout.images[:, 1]).sum()
            assert 0.94 * n_tokens < image_tokens < n_tokens
            assert 16 <= n_tokens - layout.images[-1, 3] <= 128  # text sees the whole past: little must remain
            assert bucket(n_tokens) == n_tokens  # JAX pads nothing


@pytest.mark.parametrize("size", models.SIZES[::2], ids=lambda size: size.name)
def test_a_models_prompt_ends_in_little_text(size):
    place = measure.Place(dry_run=True)
    for n_tokens in prompts.LENGTHS.values():
        prompt = models.make_prompt(size, n_tokens, place)
        assert prompt["input_ids"].shape == (1, n_tokens)
        n_text = n_tokens - models.n_image_tokens(prompt) - 10 * models.n_images(prompt)
        if size.window is None:
            assert 64 <= n_text <= 128
            assert int(prompt["image_grid_thw"].prod(-1).sum()) == 4 * models.n_image_tokens(prompt)
        else:
            assert 64 <= n_text < 64 + 266  # whole images only


def test_loops_are_read_from_machine_code():
    sass = """
        /*0000*/ MOV R1, c[0x0] ;
        /*0010*/ HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0020*/ @P0 BRA 0x90 ;
        /*0030*/ MUFU.EX2 R2, R3 ;
        /*0040*/ @!P1 BRA 0x10 ;
        /*0050*/ FADD R2, R2, R3 ;
        /*0060*/ @P1 BRA 0x50 ;
        /*0070*/ EXIT ;
        /*0090*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], R2 ;
        /*00a0*/ BRA 0x30 ;
    """
    (loop,) = cycles.read_loops(sass)
    assert (loop.instructions, loop.special, loop.matrix) == (4, 1, 1)


def test_programs_begin_in_order_where_one_has_ended():
    """Two slots: 4 and 3 begin; 2 follows the 3, 6 the 4."""
    assert cycles.makespan(np.array([4.0, 3.0, 2.0, 6.0]), 2) == 10
    assert cycles.makespan(np.array([4.0]), 132) == 4


def test_bursts_in_jax_give_the_seconds_of_one_call():
    """Of the median burst, however many calls are in one; two sets of inputs in turns."""
    in_jax, turns, spent = import_module("blindsight_gpu.in_jax"), [], []

    def call(turn):
        begun = time.perf_counter()
        time.sleep(0.005)
        turns.append(turn)
        spent.append(time.perf_counter() - begun)
        return jnp.zeros(())

    found = in_jax.seconds_per_jax_call(call, measure.Place(dry_run=False))
    assert min(spent) <= found <= 2 * max(spent)
    assert turns[:4] == [0, 1, 0, 0]


def test_the_pallas_model_predicts_what_its_page_says(monkeypatch):
    pallas_cycles = import_module("blindsight_gpu.pallas_cycles")
    counted = tuple(cycles.Loop(instructions, 66, 16) for instructions in (509, 821, 831))
    kernel = pallas_cycles.Kernel(128, 128, counted)
    assert kernel.units(counted[0])["L2"] == pytest.approx(kernel.cycles(counted[0]))  # what limits it
    assert kernel.units(counted[0], l2=100)["tensor cores"] == kernel.cycles(counted[0], l2=100) == 2048 + 300
    monkeypatch.setattr(pallas_cycles, "read_kernel", lambda dim: kernel)
    layout = prompts.make_layout(prompts.QWEN, prompts.LENGTHS["100K"])
    seconds, passes = pallas_cycles.predict_pallas(prompts.QWEN, layout, Category.INTRA_IMAGE)
    page = (ROOT / "docs" / "pallas-hopper.md").read_text(encoding="utf-8")
    useful = cycles.rate(prompts.QWEN, layout, Category.INTRA_IMAGE, seconds + passes)
    assert f"| Intra-Image | {1e3 * seconds:.2f} ms | {1e3 * passes:.2f} ms | {useful:.0f} |" in page


def result(part: str, rows: list[dict], **changes) -> dict:
    """A result file as a GPU would give it."""
    gpu = {"name": "NVIDIA H200", "driver_version": "580.1", "clocks.max.sm": "1980 MHz"}
    versions = {"torch": "2.11.0", "triton": "3.6.0", "cudnn": 91900, "jax": "0.11.2"}
    machine = {"gpu": gpu, "versions": versions, "commit": "0123456789abcdef", "source": "s"}
    return (
        dict(part=part, dry_run=False, complete=True, machine=machine, rows=rows, left_out=[], running=None) | changes
    )


ATTENTION = dict(
    case="a", shape="Qwen", heads="28/4, d=128", tokens=36864, profile="all Sink", ours_ms=2.0, speed_up=5.0,
    bound_ms=1.5, useful_tflops=400.0, flex_note="out of GPU memory", varlen_ms=3.0,
    denominator="cuDNN SDPA, causal, the same tokens",
)  # fmt: skip


PALLAS = dict(
    case="p", shape="Qwen", heads="28/4, d=128", tokens=36864, profile="all Sink", pallas_ms=1.6, triton_ms=2.0,
    against_triton=1.25, speed_up=6.0, bound_ms=1.5, tokamax_note="not installed", useful_tflops=500.0, compile_s=7.0,
    kernel="", denominator="cuDNN in JAX, causal, the same tokens",
)  # fmt: skip


def test_the_jax_rows_have_tables_of_their_own(tmp_path):
    sides = [
        dict(case="3B: 36K, sparse", tokens=36864, seconds=2.0, compile_s=40.0, peak_gib=30.0),
        dict(case="3B: 36K, dense", tokens=36864, seconds=5.0, compile_s=20.0, peak_gib=30.0),
        dict(case="12B: 300K, sparse", tokens=294912, note="not run: its KV cache takes 118 GiB"),
        dict(case="12B: 72K, sparse", tokens=73728, note="failed"),
        dict(case="12B: 72K, dense", tokens=73728, seconds=7.0),
    ]
    for part, rows in (("pallas", [PALLAS]), ("jax_model", sides)):
        (tmp_path / f"gpu-{part}.json").write_text(json.dumps(result(part, rows)))
    text = tables.section(tmp_path)
    assert (
        "| Qwen 28/4, d=128, 36,864: all Sink | 1.60 | 2.00 | 1.25x | 6.00x | 1.50 | – not installed | 500 | 7.0 |"
        in text
    )
    assert "| 3B: 36K, 36,864 tokens | 5.00 | 2.00 | 2.50x | – | 40 | 30 | – | – |" in text
    assert "| 12B: 72K, 73,728 tokens | 7.00 | – failed | – |" in text
    assert "| 12B: 300K, 294,912 tokens | – | – not run: its KV cache takes 118 GiB | – | – | – | – | – | – |" in text


def test_a_side_of_a_model_that_did_not_fit_has_its_reason(tmp_path):
    row = dict(case="12B: 72K", tokens=73728, images=9, forwards={"sparse": 4}, sparse_s=9.0, sparse_peak_gib=60.0,
        attention_share=0.25, beside_share=0.004, dense_note="not run: masks of 10 GiB")  # fmt: skip
    (tmp_path / "gpu-model.json").write_text(json.dumps(result("model", [row])))
    assert "| 12B: 72K, 73,728 tokens | – not run: masks of 10 GiB | 9.00 | – | 25% | 0.4% |" in tables.section(
        tmp_path
    )


def test_errors_of_many_lines_break_no_table(tmp_path):
    """Nor do those with bars, or a list."""
    noted = ATTENTION | dict(flex_note="failed: InductorError: no choices\n\n| M | N |\n")
    failed = {"case": "b", "failure": "AcceleratorError: CUDA error\nFor debugging consider\n"}
    (tmp_path / "gpu-attention.json").write_text(json.dumps(result("attention", [noted, failed])))
    text = tables.section(tmp_path)
    assert "| – failed: InductorError: no choices \\| M \\| N \\| |" in text
    assert text.endswith("- b: AcceleratorError: CUDA error For debugging consider")


def test_two_plots_are_drawn_and_shown_where_there_are_results(tmp_path):
    readme, found = tmp_path / "README.md", tmp_path / "results"
    found.mkdir()
    readme.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    arguments = (RENDER, "--readme", readme, "--results", found)
    assert python(*arguments).returncode == 0
    assert "docs/gpu" not in readme.read_text(encoding="utf-8")
    assert not (tmp_path / "docs").exists()
    longer = ATTENTION | dict(tokens=73728, speed_up=9.0)
    dense = dict(
        case="d", shape="Qwen", tokens=36864, kernel="cuDNN SDPA", dense_ms=10.0, first_ms=90.0, useful_tflops=650.0
    )
    (found / "gpu-attention.json").write_text(json.dumps(result("attention", [dense, ATTENTION])))
    (found / "gpu-attention_more.json").write_text(json.dumps(result("attention_more", [longer])))
    (found / "gpu-pallas.json").write_text(json.dumps(result("pallas", [PALLAS])))
    assert python(*arguments).returncode == 0
    for name in ("gpu-speed-up.svg", "gpu-tflops.svg"):
        drawn = (tmp_path / "docs" / name).read_text(encoding="utf-8")
        assert f"(docs/{name})" in readme.read_text(encoding="utf-8")
        for line in ("Triton: all Sink", "Pallas: all Sink"):
            assert f"<!-- {line} -->" in drawn
        assert ("the bound: cuDNN SDPA, dense" in drawn) == (name == "gpu-tflops.svg")
    speed_up = (tmp_path / "docs" / "gpu-speed-up.svg").read_text(encoding="utf-8")
    assert "cuDNN" not in speed_up  # not every shape's denominator is
    assert python(*arguments, "--check").returncode == 0
    (tmp_path / "docs" / "gpu-tflops.svg").unlink()
    done = python(*arguments, "--check")
    assert done.returncode == 1
    assert "gpu-tflops.svg must be there" in done.stderr


def test_tables_name_machine_denominator_and_misses(tmp_path):
    first = dict(case="v", kernel="cuDNN SDPA", dense_ms=10.0, first_ms=90.0, sm_mhz=[1500, 1900], throttle="0x4")
    failed = {"case": "b", "failure": "RuntimeError: x"}
    alone = {name: x for name, x in ATTENTION.items() if name not in ("speed_up", "bound_ms", "denominator")}
    rows = [first, ATTENTION, alone | dict(tokens=98304), failed]
    document = result("attention", rows, left_out=["c"], running="r")
    (tmp_path / "gpu-attention.json").write_text(json.dumps(document))
    other = result("bounds", [])
    other["machine"]["source"] = "t"
    (tmp_path / "gpu-bounds.json").write_text(json.dumps(other))
    text = tables.render(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter", tmp_path)
    assert text.startswith(f"before\n{tables.BEGIN}\nMeasured on one NVIDIA H200 (driver 580.1")
    assert text.endswith(f"{tables.END}\nafter")
    row = "| Qwen 28/4, d=128, 36,864: all Sink | 2.00 | 10.00 | 5.00x | 1.50 | – out of GPU memory | 3.00 | 400 |"
    assert row in text
    assert "cuDNN SDPA, causal, the same tokens" in text
    assert "- b: RuntimeError: x" in text
    assert "- r: did not end" in text
    assert "- c: left out for want of time" in text
    assert "98,304: all Sink | 2.00 | – | – | – |" in text  # the denominator failed
    assert "v: 90.00, then 10.00" in text
    assert "under load 1500 to 1900 MHz, reasons to throttle 0x4" in text
    assert "source `s`: attention; commit `0123456789ab`, source `t`: bounds;" in text


def test_rows_of_which_none_has_a_denominator_say_so(tmp_path):
    """Every dense row failed; the sentence had ended in "is ."."""
    alone = {name: x for name, x in ATTENTION.items() if name not in ("speed_up", "bound_ms", "denominator")}
    failed = {"case": "Qwen 36K: dense", "failure": "RuntimeError: x"}
    (tmp_path / "gpu-attention.json").write_text(json.dumps(result("attention", [failed, alone])))
    text = tables.section(tmp_path)
    assert "\n\nNo dense kernel was measured beside these: there is no speed-up, and no bound.\n\n" in text
    assert "the denominator" not in text


def test_what_limits_a_launch_has_units(tmp_path):
    """By counters their own; without them microseconds by kernel, and what it uses; clocks are those of all rows."""
    clocks = [dict(sm_mhz=[1500, 1800], throttle="0x4"), dict(sm_mhz=[1400, 1900], throttle="0x1")]
    counted = dict(case="one", metrics={"Duration (us)": "812.4"}, **clocks[0])
    timed = dict(case="two", ncu_note="no permission", kernels_us={"prefill": 812.4368}, uses={"registers": 255})
    found = (tmp_path / "gpu-profile.json", tmp_path / "gpu-sanitizer.json")
    found[0].write_text(json.dumps(result("profile", [counted, timed | clocks[1]])))
    found[1].write_text(json.dumps(result("sanitizer", [{"case": "memcheck: Triton", "memcheck": "0 errors"}])))
    text = tables.section(tmp_path)
    assert "| one | Duration (us): 812.4 |" in text
    assert "| two (no permission) | prefill: 812.4 µs; registers: 255 |" in text
    assert "Sanitizer: memcheck: Triton: 0 errors." in text
    assert "under load 1400 to 1900 MHz, reasons to throttle 0x1, 0x4" in text


def test_results_of_two_gpus_are_not_published(tmp_path):
    other = result("bounds", [])
    other["machine"]["gpu"]["name"] = "NVIDIA H100"
    for document in (result("attention", [ATTENTION]), other):
        (tmp_path / f"gpu-{document['part']}.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"of one GPU. Got NVIDIA H100, NVIDIA H200"):
        tables.section(tmp_path)
    with pytest.raises(ValueError, match="once each"):
        tables.render("no markers", tmp_path)


def test_the_readme_is_up_to_date(tmp_path):
    done = python(RENDER, "--check")
    assert done.returncode == 0, done.stderr
    stale = tmp_path / "README.md"
    stale.write_text(f"{tables.BEGIN}\nold\n{tables.END}\n")
    done = python(RENDER, "--check", "--readme", stale)
    assert done.returncode == 1
    assert "out of date: run python scripts/render_results.py" in done.stderr
