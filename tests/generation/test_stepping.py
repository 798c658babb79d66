"""A step at a time equals the whole-piece call: every way of stepping, long after every ring has wrapped."""

import copy

import pytest
import torch

from dsmr.console.errors import UserError
from dsmr.generation.player import Player
from dsmr.generation.sampling import Sampling
from dsmr.generation.stepping import PlainStep, Step, stepper, weights
from dsmr.generation.stepping.captured import CapturedStep, captured_step
from dsmr.generation.stepping.rings import DeviceRings, HostRings, in_step
from dsmr.generation.stepping.step import attentions
from dsmr.generation.stepping.weights import INT8_BLOCK, product, resolve_precision
from dsmr.model.attention import DSMRAttention
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel

LENGTH = 8
TOKENS = 230  # the smallest ring, of 5 + 8 slots, has wrapped 16 times, the largest, of 13 + 8, ten times


def small_model(**changes) -> DSMRModel:
    """Three layers of different horizons, with weights large enough that logits tell tokens apart."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 23,
        "schedule": "explicit(horizons=[13, 5, 0])",
        "d_model": 32,
        "n_heads": 4,
        "segment_length": LENGTH,
        "init_std": 0.15,
    }
    return DSMRModel(DSMRConfig(**(settings | changes))).eval()


def whole_and_stepped(model: DSMRModel, make, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(23, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens).logits
    state = model.new_state(rows)
    step = make(model, state)
    stepped = torch.stack([step(tokens[:, i]).clone() for i in range(TOKENS)], 1)
    assert state.position.tolist() == [TOKENS] * rows
    return whole, stepped


def on_host(precision: str = "float32"):
    return lambda model, state: Step(model, state, HostRings(attentions(model), state), precision)


def on_device(model, state):
    return Step(model, state, DeviceRings(attentions(model), state), "float32")


WAYS = {"fast": on_host(), "on device": on_device, "plain": PlainStep}
PLACES = [0, 1, LENGTH - 1, LENGTH, LENGTH + 1, 10 * 21, TOKENS - 1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("position", ["rope", "sinusoidal", "alibi", "none"])
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
@pytest.mark.parametrize("way", WAYS)
def test_steps_equal_the_whole_piece_call(way, visibility, position, backend, monkeypatch):
    monkeypatch.setenv("DSMR_BACKEND", backend)
    model = small_model(visibility=visibility, position=position)
    whole, stepped = whole_and_stepped(model, WAYS[way])
    assert whole.abs().max() > 1
    for place in PLACES:
        torch.testing.assert_close(stepped[:, place], whole[:, place], atol=1e-4, rtol=0)
    torch.testing.assert_close(stepped, whole, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
@pytest.mark.parametrize(("position", "recall", "ffn"), [("rope", 3, "gelu"), ("alibi", 0, "swiglu")])
@pytest.mark.parametrize("way", WAYS)
def test_grouped_heads_recall_and_gates_too(way, position, recall, ffn, visibility):
    model = small_model(
        schedule="explicit(horizons=[13, 5, 0], kv_heads=[2, 1, 4])",
        position=position,
        recall=recall,
        ffn=ffn,
        visibility=visibility,
    )
    whole, stepped = whole_and_stepped(model, WAYS[way])
    torch.testing.assert_close(stepped, whole, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "allowed"), [("bfloat16", 0.03), ("int8", 0.03)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("ffn", ["gelu", "swiglu"])  # swiglu: inputs that are no multiple of int8's blocks
def test_reduced_weights_change_logits_a_little(precision, allowed, rows, ffn):
    """Root mean square, relative: 8 bits of mantissa or of a weight leave half a per cent a product, some 12 deep."""
    whole, stepped = whole_and_stepped(small_model(ffn=ffn), on_host(precision), rows)
    err = (stepped - whole).square().mean().sqrt() / whole.square().mean().sqrt()
    assert 1e-5 < err < allowed


@pytest.mark.parametrize("inputs", [16, 33, INT8_BLOCK, 100])
def test_int8_products_are_right_whatever_the_number_of_inputs(inputs):
    weight, x = torch.randn(7, inputs), torch.randn(3, inputs)
    exact = x @ weight.T
    err = (product(weight, "int8")(x).float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert err < 0.02


def test_int8_products_hold_without_fbgemm_and_where_products_of_bytes_overflow(monkeypatch):
    weight, x = torch.full((7, 64), 0.5), torch.cat([torch.ones(1, 63), torch.zeros(1, 1)], 1)
    torch.testing.assert_close(product(weight, "int8")(x).float(), x @ weight.T, atol=0.3, rtol=0)
    monkeypatch.setattr(weights, "_overflows", lambda: True)
    torch.testing.assert_close(product(weight, "int8")(x).float(), x @ weight.T, atol=0.3, rtol=0)
    monkeypatch.setattr(weights, "_has_linear_dynamic", lambda: False)
    assert isinstance(product(weight, "int8"), weights.Int8PackProduct)
    torch.testing.assert_close(product(weight, "int8")(x).float(), x @ weight.T, atol=0.3, rtol=0)


@pytest.mark.parametrize("schedule", ["explicit(horizons=[13, 5, 0])", "explicit(horizons=[13, 5, 0], kv_heads=2)"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.02), (torch.float16, 0.003), (torch.int8, 1e-5)])
def test_memories_of_lower_precision_are_served_by_the_same_step(dtype, allowed, schedule):
    """In int8 both ways read the same values; in the others the call also rounds queries and weights."""
    model = small_model(schedule=schedule)
    tokens = torch.randint(23, (2, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact, whole = model(tokens).logits, model(tokens, model.new_state(2, dtype=dtype)).logits
    state = model.new_state(2, dtype=dtype)
    step = on_host()(model, state)
    stepped = torch.stack([step(tokens[:, i]).clone() for i in range(60)], 1)
    assert [memory.length.tolist() for memory in state.memories] == [
        [min(60, memory.capacity)] * 2 for memory in state.memories
    ]
    size = whole.square().mean().sqrt()
    assert (stepped - whole).square().mean().sqrt() / size < allowed
    assert (stepped - exact).square().mean().sqrt() / size > 1e-6


def test_a_step_goes_on_where_a_call_has_stopped_and_a_call_where_a_step_has():
    model = small_model(recall=2)
    tokens = torch.randint(23, (1, 90))
    with torch.no_grad():
        whole = model(tokens).logits
        state, parts = model.new_state(1), []
        for start, stop, stepping in ((0, 37, False), (37, 60, True), (60, 71, False), (71, 90, True)):
            if stepping:
                step = stepper(model, state)
                parts += [step(tokens[:, i]).clone()[:, None] for i in range(start, stop)]
            else:
                parts.append(model(tokens[:, start:stop], state).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_step_notices_what_others_did_to_the_state_meanwhile(dtype):
    """A call, a reset and a loaded state between the steps of one and the same stepper."""
    model = small_model()
    tokens = torch.randint(23, (1, 60), generator=torch.Generator().manual_seed(4))
    state, other = model.new_state(1, dtype=dtype), model.new_state(1, dtype=dtype)
    step, plain = stepper(model, state), PlainStep(model, other)

    def both(start: int, stop: int) -> None:
        for i in range(start, stop):
            torch.testing.assert_close(step(tokens[:, i]), plain(tokens[:, i]), atol=1e-4, rtol=0)

    with torch.no_grad():
        both(0, 20)
        kept = copy.deepcopy(state.state_dict())
        for one in (state, other):
            model(tokens[:, 20:41], one)
        both(41, 60)
        for one in (state, other):
            one.reset()
        both(0, 10)
        for one in (state, other):
            one.load_state_dict(kept)
        both(20, 50)


def test_steps_in_inference_mode_and_outside_of_it_follow_one_another():
    model, tokens = small_model(), torch.arange(8)
    state, other = model.new_state(1), model.new_state(1)
    plain = PlainStep(model, other)
    with torch.inference_mode():
        step = on_host()(model, state)
    for i, inside in enumerate([False, True, True, False]):
        with torch.inference_mode(inside), torch.no_grad():
            if i == 2:  # what the rings hold is taken over anew
                state.reset()
                other.reset()
            torch.testing.assert_close(step(tokens[i : i + 1]), plain(tokens[i : i + 1]), atol=1e-4, rtol=0)


def test_rings_are_written_in_place_and_time_does_not_grow_with_them():
    model = small_model()
    state = model.new_state(1)
    storage = [memory.k.data_ptr() for memory in state.memories]
    step = stepper(model, state)
    for token in range(100):
        step(torch.tensor([token % 23]))
    assert [memory.k.data_ptr() for memory in state.memories] == storage
    assert [int(memory.length[0]) for memory in state.memories] == [21, 13, 8]


def test_far_from_the_start_a_step_is_what_it_was():
    """A million tokens on, rings full, only the rotary angles differ; and these only by rounding."""
    model = small_model(position="none")
    first, second = model.new_state(1), model.new_state(1)
    tokens = torch.randint(23, (1, 64))
    for state in (first, second):
        with torch.no_grad():
            model(tokens, state)
    for memory in second.memories:
        memory.position += 21 * 13 * 8 * 500  # whole turns of every ring
    steps = stepper(model, first), stepper(model, second)
    for token in range(50):
        one, other = (step(torch.tensor([token % 23])) for step in steps)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_the_way_is_chosen_by_what_the_state_allows():
    model = small_model()
    assert isinstance(stepper(model, model.new_state(2)), Step)
    assert isinstance(stepper(small_model().double(), small_model().double().new_state(1)), PlainStep)
    uneven = model.new_state(2)
    with torch.no_grad():
        model(torch.randint(23, (2, 20)), uneven)
    uneven.reset(torch.tensor([True, False]))
    assert not in_step(uneven)
    assert isinstance(stepper(model, uneven), PlainStep)
    with pytest.raises(ValueError, match="rows of state must be in step"):
        HostRings(attentions(model), uneven)
    with pytest.raises(UserError, match="'int8' serves float32 models on a CPU"):
        stepper(model, uneven, "int8")
    with pytest.raises(ValueError, match="aligned=False"):
        stepper(model, model.new_state(1, aligned=True))
    with pytest.raises(UserError, match="unknown dtype 'int4'"):
        stepper(model, model.new_state(1), "int4")
    with pytest.raises(ValueError, match=r"tokens must have shape \(1,\).*got \(2,\)"):
        on_host()(model, model.new_state(1))(torch.tensor([1, 2]))


def test_auto_is_int8_only_where_weights_outgrow_the_cache():
    assert resolve_precision("auto", small_model()) == "float32"
    large = DSMRModel(DSMRConfig(23, "none(layers=2)", d_model=512))
    assert resolve_precision("auto", large) == "int8"
    assert resolve_precision("bfloat16", large) == "bfloat16"


# --- the body of the captured step, without the capture ----------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(seed=1, top_p=0.9), Sampling(seed=2, top_k=5), Sampling(temperature=0)])
def test_the_captured_step_draws_what_the_plain_one_draws(sampling, monkeypatch):
    model = small_model(position="rope", recall=2)
    played = []
    for make in (captured_step, lambda model, state, precision: PlainStep(model, state)):
        monkeypatch.setattr("dsmr.generation.stepping.engine.stepper", make)
        played.append(list(Player.begin(model, [3, 1, 4], sampling, variations=2).play(80)))
    assert played[0] == played[1]
    assert sampling.temperature == 0 or len({token for tokens in played[0] for token in tokens}) > 3


def test_the_captured_step_gives_the_logits_of_the_plain_one():
    model = small_model(recall=2)
    tokens = torch.randint(23, (40, 2), generator=torch.Generator().manual_seed(3))
    plain = PlainStep(model, model.new_state(2))
    captured = captured_step(model, model.new_state(2), "float32")
    for token in tokens:
        torch.testing.assert_close(captured(token), plain(token), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_runs_before_a_capture_are_taken_back_whole(dtype):
    model = small_model(visibility="sliding")
    state = model.new_state(1, dtype=dtype)
    model(torch.randint(23, (1, 60)), state)
    body = captured_step(model, state, "float32").body
    kept = {id(x): x.clone() for memory in state.memories for x in memory.tensors().values()}
    before = [tensor.clone() for tensor in body.tensors()]
    for _ in range(3):
        body.run()
    for tensor, value in zip(body.tensors(), before, strict=True):
        tensor.copy_(value)
    for memory in state.memories:
        for tensor in memory.tensors().values():
            assert torch.equal(tensor, kept[id(tensor)])


def test_the_captured_step_heeds_what_is_allowed_and_says_when_numbers_break():
    model = small_model()
    step = captured_step(model, model.new_state(1), "float32")
    assert isinstance(step, CapturedStep)
    only = torch.zeros(1, 23, dtype=torch.bool)
    only[0, 7] = True
    noise = torch.tensor([0.999])
    assert step.next(torch.tensor([1]), Sampling(), only, noise).tolist() == [7]
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    broken = captured_step(model, model.new_state(1), "float32")
    with pytest.raises(UserError, match="not finite"):
        broken.next(torch.tensor([1]), Sampling(), None, noise)
    with pytest.raises(UserError, match="'int8' is for CPUs"):
        captured_step(model, model.new_state(1), "int8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph, and there is no GPU")
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_a_replayed_graph_draws_what_the_plain_step_draws(visibility, monkeypatch):
    model = small_model(visibility=visibility).cuda()
    played, steps = [], []

    def capturing(model, state, precision):
        steps.append(captured_step(model, state, precision))
        return steps[-1]

    for make in (capturing, lambda model, state, precision: PlainStep(model, state)):
        monkeypatch.setattr("dsmr.generation.stepping.engine.stepper", make)
        played.append(list(Player.begin(model, [3, 1, 4], Sampling(seed=1, top_p=0.9)).play(200)))
    assert steps[0].graph is not None
    assert played[0] == played[1]


def test_attention_with_options_of_its_own_is_stepped_as_it_is() -> None:
    """The fast step knows a `DSMRModel`'s attention only, and a bias would be passed over in silence."""
    model = small_model()
    first = model.blocks[0].attention
    options = {"segment_length": first.segment_length, "n_kv_heads": first.n_kv_heads, "position": first.position}
    model.blocks[0].attention = DSMRAttention(first.d_model, first.n_heads, horizon=first.horizon, bias=True, **options)
    torch.nn.init.normal_(model.blocks[0].attention.qkv.bias)
    state = model.eval().new_state(1)
    assert isinstance(stepper(model, state), PlainStep)
