"""Decoding in slots that refill: the same tokens as batch by batch, eager and by captured steps."""

import contextlib

import pytest
import torch

from dschat.engine import hybrid_engine
from dschat.engine.hybrid_engine import HybridEngine, PlainGenerator
from dschat.generation import slots as slots_module
from dschat.generation.decoding import takes_graphs
from dschat.generation.kernels import attention
from dschat.generation.packed_prefill import PackedPrefill
from dschat.generation.sampling import row_noise
from dschat.generation.slots import ResponseQueue, SlotDecoder, takes_slots
from dschat.models.causal_lm import load_causal_lm
from tests.graph_stand_ins import attend, graphs_on_cpu, with_graphs
from tests.tiny_families import COMMON, tiny_family_model
from tests.unit.generation.test_decoding import config, prompts, stand_in
from tests.unit.models_helpers import FAMILIES, tiny

LONG = prompts(3, 80, 20, 66, 5, 1, 33, 70, 9, 12, 40, 41)
SHORT = prompts(7, 30, 2, 40, 11, width=40)
BATCHES = [LONG, SHORT]
EARLY = dict(max_new_tokens=40, eos_token_id=list(range(5, 264, 6)))
SAMPLED = dict(do_sample=True, top_k=0, max_new_tokens=10, num_return_sequences=3)


def engine_of(family: str):
    return stand_in(load_causal_lm(tiny(family), dtype=torch.float32).eval())


def kinds(engine, **options):
    """Yield a Hybrid Engine that decodes eagerly, then one with captured steps."""
    yield HybridEngine(engine, **options)
    with graphs_on_cpu():
        yield with_graphs(engine, **options)


def check_same(found, expected) -> None:
    """Compare tokens; plain generation stops at the longest answer of a batch."""
    for one, other in zip(found, expected, strict=True):
        width = other.tokens.shape[1]
        assert torch.equal(one.tokens[:, :width], other.tokens)
        assert not one.tokens[:, width:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_match_plain_generation(family):
    engine = engine_of(family)
    expected = PlainGenerator(engine).decode_all(BATCHES, config(**EARLY))
    assert len({row.count_nonzero() for batch in expected for row in batch.tokens}) > 1
    for slots in (3, 40):
        for hybrid in kinds(engine, slots=slots):
            check_same(hybrid.decode_all(BATCHES, config(**EARLY)), expected)
            assert (hybrid.metrics()["rollout/refills"] > 0) == (slots == 3)


@pytest.mark.parametrize("settings", [dict(min_new_tokens=9), dict(eos_token_id=[]),
                                      dict(max_new_tokens=1)], ids=str)  # fmt: skip
def test_settings_match_plain_generation(settings):
    engine = engine_of("llama")
    expected = PlainGenerator(engine).decode_all(BATCHES, config(**settings))
    for hybrid in kinds(engine, slots=4):
        check_same(hybrid.decode_all(BATCHES, config(**settings)), expected)


def test_samples_do_not_depend_on_the_slots():
    engine = engine_of("llama")
    found = []
    for slots in (2, 7, 100):
        for hybrid in kinds(engine, slots=slots):
            torch.manual_seed(3)
            found.append(hybrid.decode_all(BATCHES, config(**SAMPLED)))
    for other in found[1:]:
        check_same(other, found[0])
        for one, expected in zip(other, found[0], strict=True):
            assert torch.allclose(one.logprobs, expected.logprobs, atol=1e-4)
    torch.manual_seed(4)
    again = HybridEngine(engine, slots=4).decode_all(BATCHES, config(**SAMPLED))
    assert not torch.equal(again[0].tokens, found[0][0].tokens)
    first = found[0][0].tokens.view(len(LONG[0]), 3, -1)
    assert not torch.equal(first[:, 0], first[:, 1]), "samples of a prompt should differ"


def test_logprobs_are_those_of_the_tokens():
    engine = engine_of("opt")
    settings = config(**SAMPLED | dict(eos_token_id=[], num_return_sequences=1, temperature=0.7))
    for hybrid in kinds(engine, slots=5):
        (found,) = hybrid.decode_all([LONG], settings)
        texts = torch.cat([LONG[0], found.tokens], -1)
        masks = torch.cat([LONG[1], torch.ones_like(found.tokens)], -1)
        with torch.no_grad():
            logits = engine.module(input_ids=texts, attention_mask=masks).logits[:, 79:-1]
        scaled = (logits / 0.7).log_softmax(-1)
        expected = scaled.gather(-1, found.tokens[..., None])[..., 0]
        assert torch.allclose(found.logprobs, expected, atol=1e-4)


def test_noise_is_exponential_and_each_row_has_its_own():
    """Compare 40,000 draws per token with the softmax: chi-square with 50 degrees of freedom."""
    seed = torch.tensor([11])
    rows = torch.arange(40_000)
    noise = row_noise(seed, rows, torch.zeros_like(rows), 51)
    assert (noise > 0).all()
    logits = torch.randn(51, generator=torch.Generator().manual_seed(1))
    counts = torch.bincount((logits - noise.log()).argmax(-1), minlength=51)
    expected = 40_000 * logits.double().softmax(-1)
    assert abs(((counts - expected) ** 2 / expected).sum().item() - 50) < 4 * 100**0.5
    assert abs(noise.double().mean().item() - 1) < 0.01
    assert len(noise.unique(dim=0)) == 40_000
    steps = row_noise(seed, torch.full((9,), 5), torch.arange(9), 51)
    assert torch.equal(steps[0], noise[5]) and len(steps.unique(dim=0)) == 9
    assert not torch.equal(row_noise(seed + 1, rows[:1], rows[:1], 51)[0], noise[0])


def test_a_slot_that_ends_is_refilled_while_others_decode():
    engine = engine_of("llama")
    decoder = SlotDecoder(engine.module, slots=4)
    with torch.no_grad():
        decoder.decode(BATCHES, config(**EARLY), seed=0)
    stats = decoder.stats
    waiting = HybridEngine(engine)
    steps = 0
    with torch.no_grad():
        for first in range(0, len(LONG[0]), 4):
            found = waiting.decode(*(t[first : first + 4] for t in LONG), config(**EARLY))
            steps += int((found.tokens != 0).sum(-1).max())
    assert stats.refills > 2 and stats.responses == 17
    assert stats.metrics()["rollout/slots_busy"] > 0.9
    assert stats.steps < steps + 40


def test_samples_of_a_prompt_share_its_prefill(monkeypatch):
    engine = engine_of("llama")
    rows = []
    prefill = slots_module.prefill

    def noting(model, ids, masks, **options):
        rows.append(len(ids))
        return prefill(model, ids, masks, **options)

    monkeypatch.setattr(slots_module, "prefill", noting)
    HybridEngine(engine, slots=51).decode_all(BATCHES, config(**SAMPLED))
    assert sum(rows) == 17, "each prompt should be prefilled once"


def test_hidden_positions_of_a_prompt_are_left_out():
    queue = ResponseQueue([(torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 1, 0, 1]]))], 1)
    ids, masks = queue.batch([0])
    assert ids.tolist() == [[5, 7]] and masks.tolist() == [[1, 1]]


LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# Kinds of attention and layers: windows, sinks, mixtures, shared heads, recurrent states.
OTHER_FAMILIES = (
    *("bamba", "cohere2", "deepseek_v3", "falcon", "gemma2", "gemma3_text", "glm4", "gpt_oss"),
    *("granite", "lfm2", "llama", "llama4_text", "mamba2", "mixtral", "olmo2", "phi3"),
    *("qwen3_moe", "smollm3"),
)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in OTHER_FAMILIES else pytest.mark.slow)
        for name in COMMON
    ],
)
def test_other_families_match_plain_generation(family, monkeypatch):
    more = dict(rope_parameters=LLAMA3_ROPE) if family == "llama" else {}
    engine = stand_in(tiny_family_model(family, **more))
    batches = [prompts(3, 40, 20, 33, 5, 1, 12, width=40), prompts(7, 30, 2, width=30)]
    settings = config(max_new_tokens=20, eos_token_id=list(range(5, 264, 9)))
    expected = PlainGenerator(engine).decode_all(batches, settings)
    hybrid = HybridEngine(engine, slots=3)
    check_same(hybrid.decode_all(batches, settings), expected)
    in_slots = takes_slots(engine.module, settings) is None
    assert (hybrid.metrics()["rollout/slots"] == 3) == in_slots
    assert in_slots == (family not in NOT_IN_SLOTS)
    monkeypatch.setattr(attention, "triton", object())
    if takes_graphs(engine.module, windows=True) is None and in_slots:
        with graphs_on_cpu():
            captured = with_graphs(engine, slots=3)
            check_same(captured.decode_all(batches, settings), expected)
            assert (captured._decoder is None) == (family in FAILING_CAPTURES)


# Recurrent states, chunked attention, and layers that share keys and values.
NOT_IN_SLOTS = (
    *("bamba", "falcon_h1", "gemma3n_text", "granitemoehybrid", "jamba", "lfm2", "llama4_text"),
    *("mamba2", "nemotron_h", "qwen3_next", "recurrent_gemma", "zamba2"),
)
# Their attention takes no bounds, which the check of the first step finds.
FAILING_CAPTURES = ("bloom", "deepseek_v2", "deepseek_v3", "falcon", "minicpm3", "mpt")


def test_a_model_that_cannot_use_slots_says_so_once(caplog):
    hybrid = HybridEngine(stand_in(tiny_family_model("lfm2")), slots=4)
    for _ in range(2):
        hybrid.decode_all(BATCHES, config())
    said = [record for record in caplog.messages if "--generation_slots" in record]
    assert len(said) == 1 and "recurrent" in said[0]


def test_out_of_memory_halves_the_slots_once(monkeypatch, caplog):
    engine = engine_of("llama")
    expected = None
    for broken in (0, 1, 2):
        hybrid = HybridEngine(engine, slots=6)
        left = [broken]
        start = SlotDecoder._start

        def failing(self, queue, pairs, left=left, start=start):
            if left[0] > 0:
                left[0] -= 1
                raise torch.OutOfMemoryError("planted")
            start(self, queue, pairs)

        torch.manual_seed(1)
        with monkeypatch.context() as patch:
            patch.setattr(SlotDecoder, "_start", failing)
            outcome = pytest.raises(torch.OutOfMemoryError) if broken == 2 else None
            with outcome or contextlib.nullcontext():
                found = hybrid.decode_all(BATCHES, config(**SAMPLED))
        if broken == 0:
            expected = found
        if broken == 1:
            check_same(found, expected)
            assert hybrid.slots == 3 and "--generation_slots 3" in caplog.text


@pytest.mark.parametrize("sampled", [False, True])
def test_answers_that_lose_their_pages_continue(sampled):
    """The cache holds a few of the answers that decode together."""
    settings = dict(max_new_tokens=90, eos_token_id=list(range(5, 264, 50)))
    settings |= dict(do_sample=True, top_k=0) if sampled else {}
    engine = engine_of("llama")
    torch.manual_seed(3)
    expected = HybridEngine(engine, slots=4).decode_all(BATCHES, config(**settings))
    row = hybrid_engine.cache_bytes(engine.module, rows=1, length=192, itemsize=4)
    with graphs_on_cpu():
        hybrid = with_graphs(engine, slots=40, max_length=192, cache_gib=4 * row / 2**30)
        for _ in range(2):
            torch.manual_seed(3)
            check_same(hybrid.decode_all(BATCHES, config(**settings)), expected)
        stats, pages = hybrid._stats, hybrid._decoder._pages
        assert hybrid._decoder.prefills._buffers, "rows of prompts should be captured"
    assert stats.preempted > 0 and stats.metrics()["rollout/cache_used"] > 0.9
    assert pages.num_free == pages.num_pages - 1, "all pages should be free in the end"


@pytest.mark.parametrize("copies", [8, 70])  # 70 are more than the texts of a row
def test_samples_share_the_pages_that_their_prompt_fills(copies):
    engine = engine_of("llama")
    batch = prompts(140, width=140)
    settings = config(**SAMPLED | dict(num_return_sequences=copies))
    with graphs_on_cpu():
        hybrid = with_graphs(engine, slots=copies)
        torch.manual_seed(3)
        found = hybrid.decode_all([batch], settings)
        table = hybrid._decoder._pages
    torch.manual_seed(3)
    check_same(found, HybridEngine(engine, slots=copies).decode_all([batch], settings))
    assert table.most_used == 2 + copies, "two pages of the prompt, and one for each answer"


@pytest.mark.parametrize("fault", ["nothing is cached", "other attention"])
def test_a_wrong_captured_step_is_noticed(fault, monkeypatch):
    engine = engine_of("llama")
    expected = PlainGenerator(engine).decode_all(BATCHES, config())

    def wrong(query, key, value, new_key, new_value, bounds, scale):
        if fault == "nothing is cached":
            return attend(query, key.clone(), value.clone(), new_key, new_value, bounds, scale)
        return attend(query, key, value, new_key, new_value, bounds, 3 * scale)

    with graphs_on_cpu():
        monkeypatch.setattr(attention, "decode_attention", wrong)
        hybrid = with_graphs(engine, slots=4)
        check_same(hybrid.decode_all(BATCHES, config()), expected)
        assert hybrid._decoder is None, "graphs should be off"


def test_prompts_that_see_each_other_in_a_row_are_noticed(monkeypatch):
    engine = engine_of("llama")
    expected = PlainGenerator(engine).decode_all(BATCHES, config())
    monkeypatch.setattr(
        PackedPrefill,
        "_mask",
        lambda self, numbers: torch.ones(1, 1, *2 * numbers.shape).bool().tril(),
    )
    with graphs_on_cpu():
        hybrid = with_graphs(engine, slots=4)
        check_same(hybrid.decode_all(BATCHES, config()), expected)
        assert hybrid._decoder is None, "graphs should be off"


def test_graphs_serve_again_until_a_call_needs_more():
    engine = engine_of("llama")
    plain = PlainGenerator(engine)
    with graphs_on_cpu():
        hybrid = with_graphs(engine, slots=8)
        for _ in range(2):
            check_same(
                hybrid.decode_all(BATCHES, config(**EARLY)),
                plain.decode_all(BATCHES, config(**EARLY)),
            )
        captures = hybrid._decoder.graphs.captures
        check_same(
            hybrid.decode_all([SHORT], config(**EARLY)), plain.decode_all([SHORT], config(**EARLY))
        )
        more = [LONG, SHORT, LONG, prompts(90, 3, width=90)]
        check_same(
            hybrid.decode_all(more, config(**EARLY)), plain.decode_all(more, config(**EARLY))
        )
        assert hybrid._decoder is not None and hybrid._decoder.graphs.captures > captures
        hybrid.release_cache = True
        hybrid.end_rollout()
        assert hybrid._decoder.cache is None
        check_same(
            hybrid.decode_all(BATCHES, config(**EARLY)), plain.decode_all(BATCHES, config(**EARLY))
        )


def test_too_many_slots_are_refused_with_the_flag(monkeypatch):
    engine = engine_of("llama")
    row = hybrid_engine.cache_bytes(engine.module, rows=1, length=100, itemsize=4)
    monkeypatch.setattr(hybrid_engine, "free_memory", lambda device: 50 * row)
    HybridEngine(engine, slots=45, max_rows=400, max_length=100)
    with pytest.raises(ValueError, match="lower --generation_slots"):
        HybridEngine(engine, slots=46, max_length=100)
