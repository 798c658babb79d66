"""An exported model gives the logits of the model that it was made of, however the stream is cut, long after its
memories were compacted many times."""

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import onnx
from small_export import SEGMENT, exported, small_model, small_run

from dsmr.console.errors import UserError
from dsmr.export.write import export_run
from dsmr.exported.about import About
from dsmr.exported.model import ExportedModel, open_session
from dsmr.exported.reading import GrowingReader, read_all
from dsmr.exported.state import MOST_AT_ONCE, ExportedState, Stream
from dsmr.exported.trial import try_out
from dsmr.model.transformer import DSMRModel

TOKENS = 230  # the smallest memory, of 0 + 8 slots, begins anew 28 times
# A prompt over two segments' ends, single tokens from a young stream on, a chunk to a segment's end, one over many.
CUTS = [17, 1, 1, 1, 3, 1, 8, *[1] * 60, 45, *[1] * (TOKENS - 137)]


def heard(model: DSMRModel) -> np.ndarray:
    return np.random.default_rng(1).integers(0, model.config.vocab_size, TOKENS)


def difference(model: DSMRModel, exported: ExportedModel, cuts: list[int] = CUTS) -> float:
    """The largest difference of logits at the cuts' ends, of the largest logit."""
    tokens = heard(model)
    with torch.no_grad():
        whole = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert np.abs(whole).max() > 1
    (stream,) = exported.new_state().streams
    reader, ends = exported.reader(stream), list(accumulate(cuts))
    assert ends[-1] == TOKENS
    made = [read_all(reader, stream, tokens[end - cut : end]).copy() for cut, end in zip(cuts, ends, strict=True)]
    assert stream.position == TOKENS
    return float(np.abs(np.array(made) - whole[np.array(ends) - 1]).max() / np.abs(whole).max())


GROUPED = "explicit(horizons=[13, 5, 0], kv_heads=[2, 1, 4])"
MODELS: dict[str, dict[str, Any]] = {
    "rope": {},
    "sliding": {"visibility": "sliding"},
    "sinusoidal, untied": {"position": "sinusoidal", "tie_embeddings": False},
    "alibi, grouped": {"position": "alibi", "schedule": GROUPED},
    "alibi, sliding, grouped": {"position": "alibi", "visibility": "sliding", "schedule": GROUPED},
    "no positions": {"position": "none"},
    "recall, gates, grouped": {"recall": 3, "ffn": "swiglu", "schedule": GROUPED},
    "recall, sinusoidal, sliding": {"recall": 2, "position": "sinusoidal", "visibility": "sliding"},
    "no memory": {"schedule": "none(layers=2)"},
    "segments of many chunks": {"segment_length": MOST_AT_ONCE + 20},
    "segments of one token": {"segment_length": 1},
    "segments of two tokens, sliding": {"segment_length": 2, "visibility": "sliding"},
    "far, another base": {"schedule": "uniform(layers=2, horizon=500)", "rope_base": 500.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_an_export_gives_the_logits_of_the_model(kind, portable, tmp_path):
    """In float32 what differs is rounding."""
    model, export = exported(tmp_path, MODELS[kind], portable=portable)
    assert difference(model, export) < 5e-6
    assert difference(model, export, [TOKENS]) < 5e-6


def test_every_model_option_is_exported():
    """A new one must be looked at: every field of the configuration is changed by a model above, or changes nothing."""
    changed = {name for changes in MODELS.values() for name in changes}
    sizes = {"vocab_size", "d_model", "n_heads", "d_ff"}
    training = {"dropout", "init_std"}
    assert changed | sizes | training == set(small_model().config.to_dict())


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"weights": "int8"}, 0.05),
        ({"weights": "int8", "portable": True}, 0.05),
        ({"memory_dtype": "float16"}, 0.003),
        ({"memory_dtype": "int8"}, 0.05),
        ({"weights": "int8", "memory_dtype": "int8"}, 0.1),
    ],
)
def test_lower_precision_changes_logits_a_little(options, allowed, tmp_path):
    changes = {"position": "alibi", "visibility": "sliding", "recall": 2, "ffn": "swiglu", "schedule": GROUPED}
    assert 1e-5 < difference(*exported(tmp_path, changes, **options)) < allowed


def test_memories_stay_where_they_are(tmp_path):
    """Over a prompt, ends of segments and compactions the arrays are written in place, and nothing beside them."""
    model, export = exported(tmp_path)
    state = export.new_state()
    (stream,) = state.streams
    places = [array.ctypes.data for memory in stream.memories for array in memory]
    held = state.nbytes
    reader = export.reader(stream)
    read_all(reader, stream, heard(model))
    for token in range(3 * SEGMENT):
        before = [array.copy() for memory in stream.memories for array in memory]
        reader(np.array([token]))
        if stream.offset:  # no segment has ended: one slot of each memory has changed
            for layer in range(export.about.layers):
                slot = stream.held(layer) - 1
                for old, new in zip(before[2 * layer : 2 * layer + 2], stream.memories[layer], strict=True):
                    assert np.array_equal(np.delete(old, slot, 2), np.delete(new, slot, 2))
                    assert not np.array_equal(old[:, :, slot], new[:, :, slot])
    assert [array.ctypes.data for memory in stream.memories for array in memory] == places
    assert state.nbytes == held == 2 * 4 * 32 * sum(horizon + SEGMENT for horizon in (13, 5, 0))


def test_what_is_not_held_never_takes_part(tmp_path):
    """Slots behind those that are held may hold anything."""
    model, export = exported(tmp_path, {"visibility": "sliding"})
    clean, dirty = Stream(export.about), Stream(export.about)
    for memory in dirty.memories:
        for array in memory:
            array.fill(np.nan)
    readers = [export.reader(stream) for stream in (clean, dirty)]
    for token in heard(model)[:60]:
        one, other = (reader(np.array([token])).copy() for reader in readers)
        assert np.array_equal(one, other)


def test_a_portable_graph_runs_in_the_reference_evaluator(tmp_path):
    """Operators of the standard alone, as the standard itself defines them."""
    from onnx.reference import ReferenceEvaluator

    changes = {"recall": 2, "ffn": "swiglu", "schedule": GROUPED, "position": "alibi", "visibility": "sliding"}
    model, export = exported(tmp_path, changes, portable=True)
    graph = onnx.load(tmp_path / "export" / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} == {""}
    tokens, stream = heard(model)[:40], Stream(export.about)
    reader = GrowingReader(ReferenceEvaluator(graph), stream)
    made = [read_all(reader, stream, tokens[:19]), *(reader(tokens[i : i + 1]) for i in range(19, 40))]
    with torch.no_grad():
        whole = model(torch.from_numpy(tokens)[None]).logits[0, 18:].numpy()
    np.testing.assert_allclose(np.array(made), whole, atol=5e-6)


def test_a_state_is_kept_as_the_model_keeps_its_own(tmp_path):
    """In rings, so that either goes on from what the other has written."""
    for number, changes in enumerate(({"recall": 2}, {"visibility": "sliding", "schedule": GROUPED})):
        for portable in (False, True):
            model, export = exported(tmp_path / f"{number}{portable}", changes, portable=portable)
            tokens = heard(model)
            for place in (3, 21, 100):
                (stream,) = export.new_state().streams
                read_all(export.reader(stream), stream, tokens[:place])
                arrays, numbers = ExportedState([stream]).tensors()
                state = model.new_state(1)
                with torch.no_grad():
                    model(torch.from_numpy(tokens[:place])[None], state)
                own, own_numbers = state.tensors()
                assert numbers == own_numbers
                assert set(arrays) == set(own)
                for layer in range(export.about.layers):
                    most = own[f"{layer}.k"].shape[2]
                    slots = np.arange(place - int(arrays[f"{layer}.length"][0]), place) % most
                    assert min(place, export.about.horizons[layer]) <= len(slots) <= int(own[f"{layer}.length"][0])
                    for name in (f"{layer}.k", f"{layer}.v"):
                        theirs = own[name].numpy()[:, :, slots]
                        np.testing.assert_allclose(arrays[name][:, :, slots], theirs, atol=5e-6)
                for name in ("0.position", "recent"):
                    assert np.array_equal(arrays[name], own[name].numpy())
                (again,) = ExportedState.of_tensors(export.about, arrays, numbers).streams
                one, other = (export.reader(s)(tokens[:1]) for s in (stream, again))
                assert np.array_equal(one, other)


def test_layers_that_make_nothing_of_their_memory_are_no_mistake_of_the_runtime(tmp_path):
    model = small_run(tmp_path / "run", schedule="explicit(horizons=[13, 5])")
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
    model.save_pretrained(tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "export").error < 5e-6


def test_heads_that_the_operator_does_not_take_are_a_sentence(tmp_path):
    small_run(tmp_path / "run", d_model=24, n_heads=2)
    with pytest.raises(UserError, match=r"heads of a multiple of 8 channels, .* head_dim is 12: .* --portable"):
        export_run(tmp_path / "run", tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert export_run(tmp_path / "run", tmp_path / "export", portable=True).error < 5e-6


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("retention", ["uniform", "random"])
def test_a_model_that_keeps_others_than_the_newest_tokens_is_a_sentence(retention, portable, tmp_path):
    """An export remembers the newest: it would play other music once the memory is full."""
    small_run(tmp_path / "run", schedule=f"uniform(layers=2, horizon=16, retention={retention})")
    with pytest.raises(UserError, match=r"schedule keeps others \(retention\): play it with PyTorch"):
        export_run(tmp_path / "run", tmp_path / "export", portable=portable)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_a_runtime_that_sees_otherwise_is_refused(visibility, tmp_path):
    """A window one too wide or too narrow, or one less of what is held: as another version might read the operator."""
    model = small_run(tmp_path / "run", visibility=visibility, schedule="explicit(horizons=[40, 20])")
    export_run(tmp_path / "run", tmp_path / "export")
    about, graph = About.load(tmp_path / "export"), onnx.load(tmp_path / "export" / "model.onnx")
    nodes = [node for node in graph.graph.node if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == len(model.blocks)
    for change, said in ((1, "sees more of its memory"), (-1, "sees less of its memory .*, in layer 1")):
        changed = onnx.ModelProto()
        changed.CopyFrom(graph)
        node = [node for node in changed.graph.node if node.op_type == "GroupQueryAttention"][1]
        windows = [one for one in node.attribute if one.name == "local_window_size"]
        if visibility == "sliding":
            windows[0].i += change
        elif change < 0:
            node.attribute.append(onnx.helper.make_attribute("local_window_size", 20))
        else:
            continue
        (tmp_path / "changed.onnx").write_bytes(changed.SerializeToString())
        with pytest.raises(UserError, match=said):
            try_out(open_session(tmp_path / "changed.onnx", about, 1), about)
