"""Sinks measured in JAX: equal to the attention matrix summed by hand, to torch's, and they lead to its template."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_blindsight
import torch_blindsight
from attention_inputs import draw_inputs
from jax_blindsight.sinks import _KEYS, _look, measure_sinks
from shared_profiles import Category, sink_statistics
from shared_profiles.classifier import Thresholds
from shared_profiles.sink_statistics import SinkMass, SinkRows
from shared_profiles.state_files import one_writer
from sinks_by_hand import REACH, by_hand, lse, stacked
from strategies import layouts
from tiny_jax import in_numpy, twin
from tiny_models import family_names, make_ids, make_inputs
from torch_blindsight.sinks import measure_sinks as measure_in_torch

T = 128


@settings(max_examples=30)
@given(
    layouts(max_images=4, max_image=20).filter(lambda x: x.n_images >= 2 and x.n_tokens <= T),
    st.sampled_from([None, 7, 30]),
    st.integers(0, 99),
)
def test_rows_look_where_the_attention_matrix_says(layout, window, seed):
    """Any layout, padding and direction; what lies beyond the real tokens is nobody's business."""
    q, k, _ = (x[0] for x in draw_inputs(seed, 1, 4, 2, T, T, 8, torch.float32))
    real = [x[:, : layout.n_tokens] for x in (q, k)]
    found = SinkRows.of(layout, REACH)
    stops, keys = np.zeros(T, np.int32), np.full(_KEYS, T, np.int32)
    stops[found.rows], keys[: len(found.keys)] = found.stops, found.keys
    sums = np.full((2, 1, 4, T), -np.inf, np.float32)
    for i, category in enumerate((Category.DENSE, Category.INTRA_IMAGE)):
        sums[i, 0, :, : layout.n_tokens] = lse(*real, layout, category, 0.5, window)
    arrays = (jnp.asarray(x.numpy()[None]) for x in (q, k))
    by_key, kept = _look(*arrays, *sums, keys, stops, scale=0.5, window=window, mesh=None)
    told = np.asarray(by_key, np.float64)[:, : len(found.keys)] @ np.eye(2 * REACH + 2)[found.bins]
    kept = np.asarray(kept, np.float64)
    mass = SinkMass.of(layout, [window], told[None] / len(found.rows), kept[None] / len(found.rows))
    np.testing.assert_allclose(stacked(mass), by_hand(*real, layout, 0.5, window), atol=2e-6)


@family_names
def test_both_backends_measure_the_same(family):
    model = twin(family)
    prompt = make_inputs(family, [make_ids(5)])
    ours, (theirs,) = measure_sinks(model.params, in_numpy(prompt)), measure_in_torch(model.single, [prompt])
    for name in ("own", "text", "others", "pairs"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs.mass, name), atol=5e-6, err_msg=name)
    assert measure_sinks(model.params, in_numpy(make_inputs(family, [make_ids(1)]))) is None


def test_both_backends_learn_the_same_template(tmp_path, monkeypatch):
    """Of an untrained model nothing stands out: by a milder rule some offsets do. A state keeps what was learned."""
    for name, value in (("LIFT", 1.0), ("SHARE", 0.0), ("LOOKS", 0.0)):
        monkeypatch.setattr(sink_statistics, name, value)
    model, options = twin("qwen2_5_vl"), dict(thresholds=Thresholds(), progress=False)
    prompts = [make_inputs("qwen2_5_vl", [make_ids(2 + i % 2, seed=i)], seed=i) for i in range(3)]
    theirs = torch_blindsight.calibrate(model.single, prompts, **options)
    arrays, state = list(map(in_numpy, prompts)), tmp_path / "state.npz"
    ours = jax_blindsight.calibrate(model.params, arrays, state=state, local_block=64, **options)
    assert (ours.template.from_start, ours.template.from_end) == (theirs.template.from_start, theirs.template.from_end)
    assert len(ours.template.from_start + ours.template.from_end) > 4 and ours.template.local_block == 64
    assert ours.choice["sinks"]["prompts"] == 3
    for end in ("from_start", "from_end"):
        mine, other = (np.array(x.choice["sinks"][end], dtype=float) for x in (ours, theirs))
        np.testing.assert_allclose(mine, other, atol=5e-6)
    monkeypatch.setattr("jax_blindsight.calibration.measure_sinks", lambda *_, **__: pytest.fail("is in the state"))
    with one_writer(state), pytest.raises(ValueError, match="a state must have one writer"):
        jax_blindsight.calibrate(model.params, arrays, state=state, **options)
    again = jax_blindsight.calibrate(model.params, arrays, state=state, **options)
    assert (again.template, again.choice) == (ours.template, ours.choice)
