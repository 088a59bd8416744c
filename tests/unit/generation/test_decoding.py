"""Decoding by the replica on a CPU: sampling, reads of a prompt, and DeepSpeed's interface."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.rollout.base import RolloutRequest, SamplingConfig
from transformers import GenerationConfig

from dschat.demo.tiny_models import make_tiny_model
from dschat.engine import hybrid_engine
from dschat.engine.hybrid_engine import HybridEngine, PlainGenerator
from dschat.generation.decoding import MISSING, cache_gap, length_groups
from dschat.generation.sampling import Sampler
from dschat.models.causal_lm import load_causal_lm
from dschat.models.lora import add_lora
from tests.unit.models_helpers import tiny

ENDS = list(range(5, 264, 12))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Return the part of an engine that a generator needs, around a model with varied greedy
    answers.
    """
    path = make_tiny_model(tmp_path_factory.mktemp("steep"), family="llama", std=0.5)
    return stand_in(load_causal_lm(str(path), dtype=torch.float32).eval())


def stand_in(model):
    return SimpleNamespace(
        module=model,
        device=torch.device("cpu"),
        global_steps=0,
        eval=model.eval,
        zero_optimization_stage=lambda: 0,
    )


def prompts(*lengths: int, width: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(70, 259, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def config(**other) -> GenerationConfig:
    settings = dict(
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=ENDS,
        pad_token_id=0,
        num_return_sequences=1,
    )
    return GenerationConfig(**{**settings, **other})


def answers(tokens: torch.Tensor) -> list[list[int]]:
    ends = [
        next((i + 1 for i, t in enumerate(row) if t in ENDS), len(row)) for row in tokens.tolist()
    ]
    return [row[:end] for row, end in zip(tokens.tolist(), ends)]


@pytest.mark.parametrize(
    "settings",
    [
        dict(repetition_penalty=1.5),
        dict(min_new_tokens=9),
        dict(do_sample=True, top_k=1, temperature=0.5, num_return_sequences=3),
        dict(do_sample=True, top_k=0, top_p=1e-6, num_return_sequences=2),
        dict(eos_token_id=[]),
    ],
    ids=str,
)
def test_logits_processors_match_generate(engine, settings):
    ids, mask = prompts(3, 80, 20, 66)
    found, expected = (
        g.decode(ids, mask, config(**settings))
        for g in (HybridEngine(engine), PlainGenerator(engine))
    )
    assert answers(found.tokens) == answers(expected.tokens)
    if "repetition_penalty" in settings or "min_new_tokens" in settings:
        assert answers(found.tokens) != answers(
            PlainGenerator(engine).decode(ids, mask, config()).tokens
        )


def test_tokens_are_drawn_with_their_probability():
    """Chi-square of 40,000 draws against the softmax; 50 degrees of freedom, temperature 0.7."""
    logits = torch.randn(1, 51, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(
        config(do_sample=True, temperature=0.7, top_k=0, top_p=1.0, eos_token_id=[]), logits.device
    )
    torch.manual_seed(2)
    tokens, logprobs = sampler(logits.expand(40_000, -1), None, 0)
    p = (logits[0].double() / 0.7).softmax(-1)
    counts = torch.bincount(tokens, minlength=51)
    expected = 40_000 * p
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - 50) < 4 * 100**0.5
    wrong = 40_000 * logits[0].double().softmax(-1)
    assert ((counts - wrong) ** 2 / wrong).sum().item() > 500
    assert torch.allclose(logprobs, p.log()[tokens].float(), atol=1e-5)


def test_each_prompt_is_prefilled_once_with_prompts_of_like_length(engine):
    hybrid = HybridEngine(engine)
    read = []
    forward = hybrid.replica.model.model.forward

    def noting(**inputs):
        read.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    hybrid.replica.model.model.forward = noting
    settings = dict(
        do_sample=True, top_k=0, num_return_sequences=5, max_new_tokens=3, eos_token_id=[]
    )
    hybrid.decode(*prompts(3, 80, 20, 66), config(**settings))
    assert read == [(2, 20), (2, 80), (20, 1), (20, 1)]
    groups = [rows.tolist() for rows in length_groups(prompts(64, 65, 1, 80)[1])]
    assert groups == [[0, 2], [1, 3]]


def test_finished_rows_leave_the_batch(engine):
    hybrid = HybridEngine(engine)
    rows = []
    forward = hybrid.replica.model.model.forward

    def noting(**inputs):
        rows.append(len(inputs["input_ids"]))
        return forward(**inputs)

    hybrid.replica.model.model.forward = noting
    found = hybrid.decode(*prompts(*range(1, 17)), config())
    lengths = [len(row) for row in answers(found.tokens)]
    assert len(rows) - 1 == max(lengths) - 1 and rows[-1] < 16
    for step, count in enumerate(rows[1:], 1):
        live = sum(length > step for length in lengths)
        assert live <= count and live > 0.74 * count
    # After the end are padding and logprobs of 0.
    for row, length in enumerate(lengths):
        assert not found.tokens[row, length:].any() and not found.logprobs[row, length:].any()


def test_cache_gap_shows_what_is_not_cached_but_accepts_zeros():
    """A padding token embedded as zeros has zeros as its first layer's keys and values."""
    zeros = torch.zeros(3, 2, 4)
    some = torch.ones(3, 2, 4)
    assert cache_gap([zeros, some], [zeros, some]) == 0
    assert cache_gap([zeros, some], [zeros, 1.01 * some]) < MISSING
    assert cache_gap([some, zeros], [some, some]) == 1 > MISSING
    assert cache_gap([some, some], [zeros, some]) > MISSING
    assert not cache_gap([some * float("nan"), some], [some, some]) <= MISSING


def test_deepspeeds_interface(engine):
    engine.module.generation_config = config()
    ids, mask = prompts(5, 70)
    batch = HybridEngine(engine).generate(
        RolloutRequest(ids, mask),
        SamplingConfig(max_new_tokens=12, temperature=0.0, n_samples_per_prompt=2),
    )
    expected = PlainGenerator(engine).decode(ids, mask, config(max_new_tokens=12)).tokens
    found = batch.input_ids[:, 80:]
    assert batch.response_start_idx.tolist() == [80] * 4
    assert answers(found) == [row for row in answers(expected) for _ in range(2)]
    assert batch.attention_mask[:, 80:].sum(-1).tolist() == [len(row) for row in answers(found)]


def test_decoding_uses_nothing_deprecated_in_transformers(engine):
    ids, mask = prompts(5, 70)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        HybridEngine(engine).decode(ids, mask, config())


def test_deepspeeds_interface_works_without_end_and_padding_tokens(engine, monkeypatch):
    monkeypatch.setattr(
        engine.module, "generation_config", config(eos_token_id=None, pad_token_id=None)
    )
    ids, mask = prompts(5, 70)
    batch = HybridEngine(engine).generate(
        RolloutRequest(ids, mask),
        SamplingConfig(max_new_tokens=4, temperature=0.0, n_samples_per_prompt=1),
    )
    assert batch.input_ids.shape == (2, 84) and batch.attention_mask[:, 80:].all()


def test_too_large_a_cache_is_refused_with_the_flag_that_helps(engine, monkeypatch):
    monkeypatch.setattr(hybrid_engine, "free_memory", lambda device: 2**20)
    with pytest.raises(
        ValueError, match=r"key-value cache of 4096 answers.*--per_device_generation_batch_size"
    ):
        HybridEngine(engine, max_rows=4096, max_length=512)
    model = load_causal_lm(str(tiny("llama")), dtype=torch.float32)
    add_lora(model, dim=4, alpha=4, only_optimize_lora=True)
    with pytest.raises(ValueError, match="--hybrid_lora attach"):
        HybridEngine(stand_in(model), lora_mode="merge", max_rows=4096, max_length=512)
