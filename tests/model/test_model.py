"""The model: how a stream is cut never matters, neighbours never notice each other, gradients are the recurrence's."""

from typing import Any

import pytest
import torch

from dsmr.model.config import DSMRConfig
from dsmr.model.positions import POSITIONS
from dsmr.model.transformer import DSMRModel
from dsmr_kernels import available_backends
from dsmr_kernels.tolerance import error

BACKENDS = [name for name in available_backends() if name != "triton"]
LENGTH, VOCABULARY = 7, 13
HEADS = {"multi-head": "explicit(horizons=[11, 0, 5])", "grouped": "explicit(horizons=[11, 0, 5], kv_heads=[2, 4, 1])"}

positions = pytest.mark.parametrize("position", POSITIONS)
visibilities = pytest.mark.parametrize("visibility", ["segment", "sliding"])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DSMR_BACKEND", request.param)
    return request.param


def tiny(dtype: torch.dtype = torch.float64, **changes: Any) -> DSMRModel:
    """Weights large enough that every seen key moves the logits."""
    options = {"schedule": HEADS["grouped"], "d_model": 24, "n_heads": 4, "segment_length": LENGTH, "init_std": 0.3}
    torch.manual_seed(3)
    return DSMRModel(DSMRConfig(VOCABULARY, **(options | changes))).to(dtype)


def some_tokens(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def gradients(model: DSMRModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_memories(state: Any, other: Any) -> None:
    assert state.offset == other.offset
    for one, two in zip(state.memories, other.memories, strict=True):
        assert torch.equal(one.length, two.length)
        assert torch.equal(one.position, two.position)
        (k, v, mask), (other_k, other_v, _) = one.ordered(), two.ordered()
        held = mask[:, None, :, None]  # other slots may hold anything
        assert error(k * held, other_k * held) < 1e-10
        assert error(v * held, other_v * held) < 1e-10


# However a stream is cut


@pytest.mark.slow
@visibilities
@pytest.mark.parametrize(
    ("position", "heads", "recall"),
    [
        *((name, "grouped", 0) for name in POSITIONS),
        ("rope", "multi-head", 0),
        ("rope", "grouped", 4),
        ("sinusoidal", "multi-head", 1),
    ],
)
def test_any_way_of_cutting_a_stream_gives_the_same_logits(
    backend: str, visibility: str, position: str, heads: str, recall: int
) -> None:
    """Past several turns of every ring, token by token included; with pieces that begin anywhere."""
    model = tiny(position=position, visibility=visibility, schedule=HEADS[heads], recall=recall)
    tokens = some_tokens(2, 61)
    starts = torch.tensor([[-1] * 61, [-1] * 10 + [10] * 4 + [14] * 47], dtype=torch.int32)
    with torch.no_grad():
        whole_state = model.new_state(2)
        whole = model(tokens, whole_state, piece_start=starts).logits
    for index, sizes in enumerate([[1] * 61, [3, 0, 11, 1, 20, 7, 2, 17], [LENGTH] * 8 + [5]]):
        state, parts, begin = model.new_state(2), [], 0
        with torch.set_grad_enabled(index == 1):  # recorded or not: appended later or at once
            for size in sizes:
                step = slice(begin, begin + size)
                parts.append(model(tokens[:, step], state, piece_start=starts[:, step] - begin).logits.detach())
                begin += size
        assert error(torch.cat(parts, 1), whole) < 1e-10
        assert_same_memories(state, whole_state)


@visibilities
def test_cutting_in_float32_stays_within_rounding(backend: str, visibility: str) -> None:
    model, tokens = tiny(torch.float32, visibility=visibility, init_std=0.1), some_tokens(2, 61)
    with torch.no_grad():
        whole = model(tokens).logits
        state = model.new_state(2)
        parts = [model(tokens[:, t : t + 1], state).logits for t in range(61)]
    assert error(torch.cat(parts, 1), whole) < 1e-4


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_a_memory_as_long_as_the_piece_makes_an_ordinary_transformer(backend: str, position: str) -> None:
    tokens = some_tokens(2, 60)
    with torch.no_grad():
        recurrent = tiny(schedule="full(layers=2, length=60)", position=position)(tokens).logits
        ordinary = tiny(schedule="none(layers=2)", segment_length=60, position=position)(tokens).logits
    assert error(recurrent, ordinary) < 1e-10


@pytest.mark.parametrize(
    ("schedule", "visibility", "reach"),
    [
        ("none(layers=3)", "segment", 42),
        ("explicit(horizons=[5, 0])", "segment", 42 - 5),
        ("explicit(horizons=[5, 0])", "sliding", 45 - 5),
        ("explicit(horizons=[0, 9])", "segment", 42 - 9 - 5),  # what lies 9 back has itself seen its own segment
        ("explicit(horizons=[4, 9])", "sliding", 45 - 13),
    ],
)
def test_a_token_is_heard_exactly_as_far_as_the_horizons_reach(
    backend: str, schedule: str, visibility: str, reach: int
) -> None:
    """The logits at token 45, of the segment 42 ... 48, hear token `reach` and nothing before it."""
    model, tokens = tiny(schedule=schedule, visibility=visibility), some_tokens(1, 46)
    with torch.no_grad():
        logits = model(tokens).logits[0, 45]
        for token in (reach - 1, reach):
            changed = tokens.clone()
            changed[0, token] = (changed[0, token] + 1) % VOCABULARY
            moved = error(model(changed).logits[0, 45], logits)
            assert (moved > 1e-9) == (token == reach)


# Whole-piece passes train like the recurrence


@pytest.mark.slow
@positions
@visibilities
def test_n_segments_in_one_call_are_n_calls_in_loss_gradients_and_state(
    backend: str, visibility: str, position: str
) -> None:
    model = tiny(position=position, visibility=visibility)
    tokens, targets = some_tokens(2, 6 * LENGTH + 3), some_tokens(2, 6 * LENGTH + 3, seed=1)
    targets[:, ::5] = -100
    one, many = model.new_state(2, aligned=True), model.new_state(2, aligned=True)
    for state in (one, many):  # both begin with something in memory
        with torch.no_grad():
            model(some_tokens(2, 2 * LENGTH, seed=2), state)
    loss = model(tokens, one, targets=targets, reduction="none").loss
    loss.sum().backward()
    whole = gradients(model)
    parts = []
    for begin in range(0, tokens.shape[1], LENGTH):
        step = slice(begin, begin + LENGTH)
        parts.append(model(tokens[:, step], many, targets=targets[:, step], reduction="none").loss)
        parts[-1].sum().backward()
    assert error(torch.cat(parts, 1), loss) < 1e-5  # the loss itself is float32
    for name, gradient in gradients(model).items():
        assert error(gradient, whole[name]) <= 1e-5 * float(whole[name].abs().max()), name
    assert_same_memories(one, many)


def test_two_forwards_before_a_backward_give_the_right_gradients(backend: str) -> None:
    """The appends are deferred to where the state is next looked at: a backward that comes late must not notice."""
    model, tokens = tiny(), some_tokens(2, 6 * LENGTH)
    chunks = tokens.split(2 * LENGTH, 1)
    state = model.new_state(2, aligned=True)
    for chunk in chunks:
        model(chunk, state).logits.square().sum().backward()
    expected = gradients(model)
    state = model.new_state(2, aligned=True)
    outs = [model(chunk, state).logits.square().sum() for chunk in chunks]
    for out in outs[::-1]:
        out.backward()
    for name, gradient in gradients(model).items():
        assert error(gradient, expected[name]) <= 1e-9 * float(expected[name].abs().max()), name


@pytest.mark.parametrize("aligned", [True, False])
def test_training_writes_the_rings_in_place(backend: str, aligned: bool) -> None:
    model = tiny()
    state = model.new_state(2, aligned=aligned)
    before = [(m.k.data_ptr(), m.v.data_ptr()) for m in state.memories], state.nbytes
    for seed in range(5):
        tokens = some_tokens(2, 3 * LENGTH, seed)
        model(tokens, state, targets=tokens).loss.backward()
    assert ([(m.k.data_ptr(), m.v.data_ptr()) for m in state.memories], state.nbytes) == before
    assert state.position.tolist() == [15 * LENGTH] * 2


def test_a_piece_start_buffer_may_be_filled_anew_after_the_call() -> None:
    model, tokens = tiny(), some_tokens(2, LENGTH)
    buffer = torch.tensor([[-1, -1, 2, 2, 2, 2, 2], [-1] * LENGTH], dtype=torch.int32)
    state = model.new_state(2)
    model(tokens, state, piece_start=buffer)
    buffer.fill_(-1)
    assert state.position.tolist() == [5, 7]


@pytest.mark.parametrize("ffn", ["gelu", "swiglu"])
@pytest.mark.parametrize("tied", [True, False])
@positions
def test_every_parameter_takes_a_gradient(position: str, tied: bool, ffn: str) -> None:
    model = tiny(position=position, tie_embeddings=tied, ffn=ffn)
    tokens = some_tokens(2, 3 * LENGTH)
    model(tokens, targets=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = tiny(), tiny(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    more = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert more == VOCABULARY * 24


def test_the_loss_is_the_mean_over_targets_and_none_gives_each() -> None:
    model, tokens, targets = tiny(), some_tokens(2, 20), some_tokens(2, 20, seed=1)
    targets[0, 3:9] = -100
    out = model(tokens, targets=targets)
    each = model(tokens, targets=targets, reduction="none").loss
    exact = -out.logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    assert out.logits.shape == (2, 20, VOCABULARY)
    assert each.dtype == torch.float32
    assert error(each, exact) < 1e-5
    assert float(out.loss.detach()) == pytest.approx(float(exact.detach().sum()) / (40 - 6), rel=1e-5)
    assert model(tokens).loss is None


# Pieces and rows


@positions
@visibilities
def test_two_pieces_in_one_segment_do_not_see_each_other(backend: str, visibility: str, position: str) -> None:
    """What the first piece played changes nothing in the second, which is what it would be alone."""
    model, tokens = tiny(position=position, visibility=visibility), some_tokens(2, 40)
    begin = 17  # in the third segment
    starts = torch.tensor([[-1] * begin + [begin] * (40 - begin)] * 2, dtype=torch.int32)
    changed = tokens.clone()
    changed[:, :begin] = (changed[:, :begin] + 1) % VOCABULARY
    with torch.no_grad():
        logits = model(tokens, piece_start=starts).logits
        other = model(changed, piece_start=starts).logits
        alone_state = model.new_state(2)
        alone_state.offset = begin % LENGTH
        alone = model(tokens[:, begin:], alone_state).logits
    assert torch.equal(other[:, begin:], logits[:, begin:])
    assert not torch.equal(other[:, :begin], logits[:, :begin])
    assert error(alone, logits[:, begin:]) < 1e-10


@visibilities
def test_no_gradient_crosses_from_one_piece_to_the_next(backend: str, visibility: str) -> None:
    model, tokens = tiny(visibility=visibility, tie_embeddings=False), torch.arange(LENGTH)[None]
    starts = torch.tensor([[-1] * 3 + [3] * 4], dtype=torch.int32)
    model(tokens, piece_start=starts).logits[:, 3:].square().sum().backward()
    heard = model.embedding.weight.grad.any(1)
    assert heard.tolist() == [False] * 3 + [True] * 4 + [False] * (VOCABULARY - LENGTH)


@visibilities
def test_a_reset_row_is_a_fresh_row_and_its_neighbours_do_not_notice(backend: str, visibility: str) -> None:
    model, tokens = tiny(visibility=visibility), some_tokens(3, 80)
    with torch.no_grad():
        undisturbed = model(tokens).logits[:, 33:]
        state = model.new_state(3)
        model(tokens[:, :33], state)
        state.reset(torch.tensor([False, True, False]))
        logits = model(tokens[:, 33:], state).logits
        fresh_state = model.new_state(1)
        fresh_state.offset = 33 % LENGTH
        fresh = model(tokens[1:2, 33:], fresh_state).logits
    assert error(logits[1:2], fresh) < 1e-10
    assert error(logits[[0, 2]], undisturbed[[0, 2]]) < 1e-10
    assert state.position.tolist() == [80, 47, 80]


@visibilities
def test_a_reset_of_all_rows_is_a_new_state(backend: str, visibility: str) -> None:
    model, tokens = tiny(visibility=visibility), some_tokens(2, 30)
    with torch.no_grad():
        state = model.new_state(2)
        model(some_tokens(2, 33, seed=5), state)
        state.reset()
        assert error(model(tokens, state).logits, model(tokens).logits) < 1e-12


@visibilities
def test_rows_are_independent_of_the_batch(backend: str, visibility: str) -> None:
    model, tokens = tiny(visibility=visibility), some_tokens(3, 50)
    starts = torch.tensor([[-1] * 50, [0] * 20 + [20] * 30, [-1] * 5 + [5] * 45], dtype=torch.int32)
    with torch.no_grad():
        together = model(tokens, piece_start=starts).logits
        for row in range(3):
            alone = model(tokens[row : row + 1], piece_start=starts[row : row + 1]).logits
            assert error(alone, together[row : row + 1]) < 1e-10


# State


@visibilities
@pytest.mark.parametrize("heads", HEADS)
def test_an_aligned_state_is_the_budget_and_gives_the_same_logits(backend: str, heads: str, visibility: str) -> None:
    model, tokens = tiny(visibility=visibility, schedule=HEADS[heads]), some_tokens(3, 8 * LENGTH)
    budget = model.config.schedule.budget_bytes(n_heads=4, head_dim=6, bytes_per_element=8, batch=3)
    with torch.no_grad():
        state = model.new_state(3, aligned=True)
        assert state.nbytes == budget
        whole = model(tokens).logits
        parts = [model(chunk, state).logits for chunk in tokens.split(2 * LENGTH, 1)]
    assert error(torch.cat(parts, 1), whole) < 1e-10
    assert state.nbytes == budget
    for memory, horizon in zip(state.memories, model.config.schedule.horizons, strict=True):
        assert memory.capacity == horizon
        assert memory.length.tolist() == [horizon] * 3


def test_an_aligned_state_refuses_to_begin_within_a_segment() -> None:
    model = tiny()
    state = model.new_state(1, aligned=True)
    model(some_tokens(1, LENGTH + 3), state)
    with pytest.raises(ValueError, match="takes calls that begin with a segment, but it is 3 tokens into one"):
        model(some_tokens(1, 4), state)
    state.reset()
    model(some_tokens(1, 4), state)


def test_playing_on_does_not_grow_the_state() -> None:
    model = tiny(torch.float32)
    state = model.new_state(1)
    before = [(m.k.data_ptr(), m.v.data_ptr()) for m in state.memories], state.nbytes
    with torch.no_grad():
        for seed in range(20):
            model(some_tokens(1, 101, seed), state)
    assert ([(m.k.data_ptr(), m.v.data_ptr()) for m in state.memories], state.nbytes) == before


def test_autocast_to_bfloat16_keeps_the_state_in_bfloat16(backend: str) -> None:
    model, tokens = tiny(torch.float32, init_std=0.05), some_tokens(2, 3 * LENGTH)
    exact = model(tokens, targets=tokens).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens, targets=tokens)
        assert {memory.k.dtype for memory in out.state.memories} == {torch.bfloat16}
        loss = out.loss + model(tokens, out.state, targets=tokens).loss
    loss.backward()
    assert out.loss.dtype == torch.float32
    assert float(out.loss.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_a_state_of_its_own_dtype_is_kept() -> None:
    model = tiny(torch.float32)
    state = model.new_state(2, dtype=torch.bfloat16)
    logits = model(some_tokens(2, 20), state).logits
    assert logits.dtype == torch.float32
    assert {memory.k.dtype for memory in state.memories} == {torch.bfloat16}


def test_dropout_is_for_training_only() -> None:
    model, tokens = tiny(dropout=0.5), some_tokens(1, 20)
    plain = tiny()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("count", [0, 1])
def test_calls_of_no_token_and_of_one(backend: str, count: int) -> None:
    model = tiny()
    out = model(some_tokens(2, count))
    assert out.logits.shape == (2, count, VOCABULARY)
    assert out.state.position.tolist() == [count] * 2


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(5, dtype=torch.int64)}, r"tokens must have shape \(batch, tokens\), got \(5,\)"),
        ({"state": (3, None)}, "the state holds 3 streams, but tokens has 2 rows"),
        ({"state": (2, "none(layers=4)")}, "the state holds 4 layers, but the model has 3"),
        ({"targets": (5, 2)}, r"targets must have the shape of tokens, \(2, 5\), got \(5, 2\)"),
        ({"piece_start": (2, 6)}, r"piece_start must have the shape of tokens, \(2, 5\), got \(2, 6\)"),
        ({"piece_start": (1, 5)}, r"piece_start must have the shape of tokens, \(2, 5\), got \(1, 5\)"),
        ({"reduction": "sum"}, 'reduction must be "mean" or "none", got \'sum\''),
    ],
)
def test_what_does_not_fit_is_refused_before_the_state_moves(arguments: dict, message: str) -> None:
    model = tiny()
    state = model.new_state(2)
    given: dict[str, Any] = {"tokens": some_tokens(2, 5), "state": state, "targets": some_tokens(2, 5)} | arguments
    if "state" in arguments:
        batch, schedule = arguments["state"]
        given["state"] = (tiny(schedule=schedule) if schedule else model).new_state(batch)
    for name, dtype in (("targets", torch.int64), ("piece_start", torch.int32)):
        if name in arguments:
            given[name] = torch.zeros(arguments[name], dtype=dtype)
    with pytest.raises(ValueError, match=message):
        model(given.pop("tokens"), **given)
    assert (state.offset, state.position.tolist()) == (0, [0, 0])


def test_different_layers_of_a_model_have_different_horizons_and_heads() -> None:
    shapes = [(m.capacity, m.kv_heads) for m in tiny().new_state(1, aligned=True).memories]
    assert shapes == [(11, 2), (0, 4), (5, 1)]


# Recall


def test_recall_hears_nothing_of_an_earlier_piece() -> None:
    model, tokens = tiny(recall=3, segment_length=16), some_tokens(1, 12)
    starts = torch.tensor([[0] * 5 + [5] * 7], dtype=torch.int32)
    changed = tokens.clone()
    changed[0, :5] = (changed[0, :5] + 1) % VOCABULARY
    with torch.no_grad():
        one, other = (model(x, piece_start=starts).logits[:, 5:] for x in (tokens, changed))
        alone = model(tokens[:, 5:]).logits
    assert torch.equal(one, other)
    assert error(one, alone) < 1e-10


def test_recall_matches_what_followed_the_same_past_from_the_start() -> None:
    """Untrained, a query's label is most like the keys' that came after the same tokens."""
    model = tiny(recall=2, schedule="none(layers=1)", segment_length=64)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3]])
    assert model.recall is not None
    with torch.no_grad():
        embedded = model.embedding(torch.cat([torch.zeros(1, 2, dtype=torch.int64), tokens], 1))
        queries, keys = model.recall(embedded, torch.arange(11)[None])
        q, k = (part[0] for part in (queries, keys))
        attention = model.blocks[0].attention
        q, k = q @ attention.qkv.weight[:6].T, k @ attention.qkv.weight[24:30].T  # of the first head
    assert int((q[-1] @ k.T).argmax()) == 3  # the token after the first 2, 3


@pytest.mark.parametrize("recall", [-1, 1.5, True])
def test_recall_must_be_a_count(recall: Any) -> None:
    with pytest.raises(ValueError, match="recall must be an integer >= 0"):
        tiny(recall=recall)
