"""Decoding by captured steps, with stand-in graphs: slots, compaction, captures and their check."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dschat.engine.hybrid_engine import HybridEngine, PlainGenerator
from dschat.generation.decoding import takes_graphs
from dschat.generation.kernels import attention
from dschat.generation.kernels.linear import SkinnyLinear
from dschat.models.causal_lm import load_causal_lm
from tests.graph_stand_ins import attend, graphs_on_cpu, with_graphs
from tests.tiny_families import tiny_family_model
from tests.unit.generation.test_decoding import config, prompts, stand_in
from tests.unit.models_helpers import FAMILIES, tiny


@pytest.fixture(autouse=True)
def stand_ins():
    with graphs_on_cpu():
        yield


def engine_of(family: str):
    return stand_in(load_causal_lm(tiny(family), dtype=torch.float32).eval())


def same(found, expected) -> None:
    """Return whether the tokens are equal; plain generation stops at the longest answer."""
    width = expected.tokens.shape[1]
    assert (
        torch.equal(found.tokens[:, :width], expected.tokens) and not found.tokens[:, width:].any()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_match_plain_generation(family):
    engine = engine_of(family)
    hybrid = with_graphs(engine)
    plain = PlainGenerator(engine)
    many = prompts(3, 80, 20, 66, 5, 1, 33, 70, 9, 12, 40, 41)
    few = prompts(7, 30, 2, 40, 11, width=40)
    early = dict(max_new_tokens=40, eos_token_id=list(range(5, 264, 6)))
    expected = plain.decode(*many, config(**early))
    for _ in range(2):
        same(hybrid.decode(*many, config(**early)), expected)
    captured = hybrid._decoder.graphs.captures
    assert captured > 1, "rows that have ended should leave"
    same(hybrid.decode(*few, config(**early)), plain.decode(*few, config(**early)))
    more = hybrid._decoder.graphs.captures
    same(hybrid.decode(*many, config(**early)), expected)
    assert hybrid._decoder.graphs.captures == more > captured, (
        "what was captured should serve again"
    )
    # Longer answers than the cache holds, other settings and freed buffers: captured again.
    for settings in (dict(max_new_tokens=90), dict(max_new_tokens=90, min_new_tokens=5)):
        same(hybrid.decode(*many, config(**settings)), plain.decode(*many, config(**settings)))
    hybrid.release_cache = True
    hybrid.end_rollout()
    assert hybrid._decoder.cache is None
    same(hybrid.decode(*many, config(**early)), expected)


@pytest.mark.parametrize(
    "settings",
    [
        dict(repetition_penalty=1.5),
        dict(do_sample=True, top_k=1, temperature=0.5, num_return_sequences=3),
        dict(do_sample=True, top_k=0, top_p=1e-6, num_return_sequences=2),
        dict(eos_token_id=[]),
    ],
    ids=str,
)
def test_settings_match_plain_generation(settings):
    engine = engine_of("llama")
    hybrid = with_graphs(engine)
    for reads in (prompts(3, 80, 20, 66), prompts(4, 9, 60, width=64)):
        same(
            hybrid.decode(*reads, config(**settings)),
            PlainGenerator(engine).decode(*reads, config(**settings)),
        )
    assert hybrid._decoder is not None


def test_logprobs_are_those_of_the_tokens():
    engine = engine_of("opt")
    ids, mask = prompts(3, 80, 20, 66)
    found = with_graphs(engine).decode(ids, mask, config(eos_token_id=[]))
    texts = torch.cat([ids, found.tokens], -1)
    masks = torch.cat([mask, torch.ones_like(found.tokens)], -1)
    with torch.no_grad():
        logits = engine.module(input_ids=texts, attention_mask=masks).logits[:, 79:-1]
    expected = logits.log_softmax(-1).gather(-1, found.tokens[..., None])[..., 0]
    assert torch.allclose(found.logprobs, expected, atol=1e-4)


def test_answers_that_all_begin_with_padding_keep_their_graphs():
    """The padding token's embedding is zeros, and so are the first layer's keys and values."""
    engine = engine_of("llama")
    ids, mask = prompts(80, 80, 80)
    model = engine.module
    with torch.no_grad():
        ends = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1]
        model.lm_head.weight[0] = torch.linalg.pinv(ends) @ torch.full((3,), 1e3)
    hybrid = with_graphs(engine)
    found = hybrid.decode(ids, mask, config(eos_token_id=[]))
    assert found.tokens[:, 0].tolist() == [0, 0, 0] and hybrid._decoder is not None
    same(found, PlainGenerator(engine).decode(ids, mask, config(eos_token_id=[])))
    keys, values = hybrid._decoder.cache.newest(rows=3, position=80)[:2]
    assert not keys.any() and not values.any(), "the first layer's should be zeros"


@pytest.mark.parametrize("fault", ["nothing is cached", "other attention"])
def test_a_wrong_captured_step_is_noticed(fault, monkeypatch):
    engine = engine_of("llama")
    reads = prompts(3, 80, 20, 66)

    def wrong(query, key, value, new_key, new_value, bounds, scale):
        if fault == "nothing is cached":
            return attend(query, key.clone(), value.clone(), new_key, new_value, bounds, scale)
        return attend(query, key, value, new_key, new_value, bounds, 3 * scale)

    monkeypatch.setattr(attention, "decode_attention", wrong)
    hybrid = with_graphs(engine)
    same(hybrid.decode(*reads, config()), PlainGenerator(engine).decode(*reads, config()))
    assert hybrid._decoder is None, "graphs should be off"


def made(kind: str, **more):
    """Return a miniature transformers model outside FAMILIES, with varied greedy answers."""
    sizes = dict(
        vocab_size=264,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    return stand_in(model)


def test_a_model_whose_steps_fail_answers_without_graphs():
    engine = made("falcon")
    reads = prompts(3, 80, 20, 66)
    expected = PlainGenerator(engine).decode(*reads, config())
    hybrid = with_graphs(engine)
    same(hybrid.decode(*reads, config()), expected)
    assert hybrid._decoder is None, "its attention takes no bounds"


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3"])
@pytest.mark.parametrize("slots", [0, 2])
def test_latent_attention_never_reaches_the_kernel(family, slots, monkeypatch):
    engine = stand_in(tiny_family_model(family, std=0.5))
    reads = prompts(3, 40, 20)
    expected = PlainGenerator(engine).decode(*reads, config())
    launched = []
    monkeypatch.setattr(attention, "decode_attention", lambda *args: launched.append(args))
    hybrid = with_graphs(engine, slots=slots)
    (found,) = hybrid.decode_all([reads], config())
    same(found, expected)
    assert hybrid._decoder is None and not launched


def test_attention_with_a_cap_on_its_scores_gets_no_graphs(monkeypatch):
    monkeypatch.setattr(attention, "triton", object())
    full = dict(layer_types=["full_attention"] * 2, attn_logit_softcapping=5.0)
    assert takes_graphs(tiny_family_model("gemma2", **full)) == "its attention caps its scores"
    assert takes_graphs(tiny_family_model("qwen3")) is None


def test_dropping_the_graphs_restores_the_layers():
    hybrid = with_graphs(engine_of("llama"))
    model = hybrid.replica.model
    reads = prompts(3, 80)
    hybrid.decode(*reads, config())
    assert any(isinstance(module, SkinnyLinear) for module in model.modules())
    hybrid._drop_graphs()
    assert not any(isinstance(module, SkinnyLinear) for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    same(hybrid.decode(*reads, config()), PlainGenerator(hybrid.engine).decode(*reads, config()))


def test_captures_draw_no_random_numbers():
    hybrid = with_graphs(engine_of("llama"))
    reads = prompts(3, 80, 20, 66)
    found = []
    for _ in range(3):
        torch.manual_seed(5)
        found.append(hybrid.decode(*reads, config(do_sample=True, top_k=0, eos_token_id=[])).tokens)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


ROPES = {
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "longrope": dict(
        rope_type="longrope",
        factor=8.0,
        original_max_position_embeddings=64,
        long_factor=[2.0] * 8,
        short_factor=[1.0] * 8,
    ),
}


@pytest.mark.parametrize("rope", [None, *ROPES])
def test_embeddings_that_depend_on_the_longest_text_take_no_graphs(rope, monkeypatch):
    monkeypatch.setattr(attention, "triton", object())
    parameters = (
        dict(rope_theta=10000.0, **ROPES[rope])
        if rope
        else dict(rope_theta=10000.0, rope_type="default")
    )
    engine = made("llama", max_position_embeddings=512, rope_parameters=parameters)
    reason = takes_graphs(engine.module)
    assert reason is None if rope is None else "the longest text" in reason


def test_prompts_of_different_lengths_are_embedded_as_in_training():
    engine = made("llama", rope_parameters=dict(rope_theta=10000.0, **ROPES["longrope"]))
    ids, mask = prompts(9, 80, 20)
    found = HybridEngine(engine).decode(ids, mask, config(eos_token_id=[]))
    same(found, PlainGenerator(engine).decode(ids, mask, config(eos_token_id=[])))
    texts = torch.cat([ids, found.tokens], -1)
    masks = torch.cat([mask, torch.ones_like(found.tokens)], -1)
    with torch.no_grad():
        positions = (masks.cumsum(-1) - 1).clamp(min=0)
        logits = engine.module(
            input_ids=texts, attention_mask=masks, position_ids=positions
        ).logits[:, 79:-1]
    expected = logits.log_softmax(-1).gather(-1, found.tokens[..., None])[..., 0]
    assert torch.allclose(found.logprobs, expected, atol=1e-3)
