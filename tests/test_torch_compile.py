"""`torch.compile(fullgraph=True)` of a patched model's language part: no graph break, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig

from interpreted import worker
from interpreted_models import compiled
from tiny_models import IMAGE, VIDEO, make_ids, make_inputs, make_model, mixed_profile, patch
from torch_blindsight.attention import announce, prefill_op

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning"
)  # torch's own, on importing its compiler


LANGUAGE_MODEL, SECOND_LAYER = "model.language_model", "model.language_model.layers.1"


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


def assert_same(got, want, report):
    """One graph serves prompts of every length; a forward that runs dense has one of its own."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=0, atol=1e-5)
    assert report["forwards"] == {"sparse": 6, "dense: fewer than two images": 2}


@pytest.mark.parametrize(
    ("family", "part", "backend"),
    [
        ("qwen2_vl", SECOND_LAYER, "eager"),
        ("qwen2_5_vl", LANGUAGE_MODEL, "aot_eager"),
        ("gemma3", LANGUAGE_MODEL, "aot_eager"),
        ("gemma3", SECOND_LAYER, "aot_eager"),
    ],
    ids=["qwen2_vl-layer-eager", "qwen2_5_vl-aot", "gemma3-aot", "gemma3-layer-aot"],
)
def test_portable(family, part, backend):
    assert_same(*compiled(family, "portable", backend, part))


def test_a_patched_model_may_be_compiled_as_a_whole():
    """Not in one graph: the patch reads the prompt between two."""
    model = make_model("qwen2_vl", n_layers=1)
    inputs = [make_inputs("qwen2_vl", [make_ids(n)]) for n in (3, 1)]
    with torch.no_grad(), patch(model, mixed_profile(model)) as handle:
        want = [model(**x).logits for x in inputs]
        whole = torch.compile(model, backend="eager")
        for x, logits in zip(inputs, want, strict=True):
            torch.testing.assert_close(whole(**x).logits, logits, rtol=0, atol=1e-5)
        assert handle.report()["forwards"] == {"sparse": 2, "dense: fewer than two images": 2}


@pytest.mark.parametrize(
    ("device", "options"),
    [
        ("cpu", {"compile_config": CompileConfig(backend="eager", mode=None)}),
        pytest.param("cuda", {}, marks=pytest.mark.gpu),  # inductor and CUDA graphs, transformers' default there
    ],
)
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_generate_on_a_static_cache_compiles_its_decode_steps(device, options):
    """The prefill before them is sparse, and is not compiled."""
    model = make_model("qwen2_5_vl", n_layers=2).to(device)
    inputs = {name: x.to(device) for name, x in make_inputs("qwen2_5_vl", [make_ids(3), make_ids(2)]).items()}
    if options:
        options["compile_config"]._compile_all_devices = True
    greedy = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    greedy["suppress_tokens"] = [IMAGE, VIDEO]
    with torch.no_grad(), patch(model, mixed_profile(model)) as handle:
        want = model.generate(**inputs, **greedy).logits
        got = model.generate(**inputs, **greedy, **options, cache_implementation="static").logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        assert handle.report()["forwards"] == {"sparse": 2, "dense: decode step": 10}
    assert hasattr(model, "_compiled_call")


def test_triton():
    with worker() as call:
        assert_same(*call(compiled, "qwen2_5_vl", "triton", "aot_eager", LANGUAGE_MODEL))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # inductor's advice; float32 is on purpose
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_triton_on_a_gpu(family):
    assert_same(*compiled(family, "triton", "inductor", LANGUAGE_MODEL, device="cuda"))


def test_the_operator():
    """Its fake gives the shape, strides and dtype of the real thing; and it is left out of recorded CUDA graphs."""
    model = make_model("qwen2_5_vl", n_layers=1)
    seen = []

    def record(*arguments):
        seen.append(arguments)
        return prefill_op(*arguments)

    with torch.no_grad(), patch(model, mixed_profile(model), impl="reference"), pytest.MonkeyPatch.context() as monkey:
        monkey.setattr("torch_blindsight.attention.prefill_op", record)
        model(**make_inputs("qwen2_5_vl", [make_ids(2)]))
        handle = model._blindsight_handle
        handle._before(model, (), make_inputs("qwen2_5_vl", [make_ids(2)]))
        torch.library.opcheck(prefill_op, seen[0], test_utils=("test_schema", "test_faketensor"))
        announce(None)
    assert torch.Tag.cudagraph_unsafe in torch.ops.blindsight.prefill.default.tags


def test_gradients_that_do_not_exist_are_refused():
    """Compiled, or by an implementation without them; forwards alone run with gradients enabled."""
    model = make_model("qwen2_5_vl", n_layers=1)
    inputs = make_inputs("qwen2_5_vl", [make_ids(2)])
    with patch(model, mixed_profile(model), impl="reference"):
        logits = model(**inputs).logits
    with pytest.raises(NotImplementedError, match=r"cannot be differentiated.*impl='portable'"):
        logits.sum().backward()


def test_the_operator_without_a_prompt_is_refused():
    q, k = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    with pytest.raises(RuntimeError, match="Got a sparse forward with no prompt announced"):
        prefill_op(q, k, k, 0, 0.25, None)
