"""Progress that decoders report: batches, answers that have ended, and tokens."""

import contextlib

import pytest
import torch

from dschat.engine.hybrid_engine import HybridEngine, PlainGenerator
from dschat.models.causal_lm import load_causal_lm
from dschat.runtime.activity import watched
from tests.graph_stand_ins import graphs_on_cpu, with_graphs
from tests.unit.generation.test_decoding import config, prompts, stand_in
from tests.unit.models_helpers import tiny

BATCHES = [prompts(3, 80, 20, 66, 5, 1, 33, 70, 9, 12, 40, 41), prompts(9, 41, 12, 3)]
SETTINGS = config(max_new_tokens=40, eos_token_id=list(range(5, 264, 6)))


@pytest.fixture(scope="module")
def engine():
    return stand_in(load_causal_lm(tiny("llama"), dtype=torch.float32).eval())


def decode(generator) -> tuple[list, list[dict]]:
    """Return responses, and what was reported meanwhile."""
    reports = []
    with watched(lambda **counts: reports.append(counts)):
        decoded = generator.decode_all(BATCHES, SETTINGS)
    return decoded, reports


def ended_after(responses: torch.Tensor, token: int) -> int:
    """Return how many responses have ended within `token` tokens."""
    ends = torch.isin(responses[:, :token], torch.tensor(SETTINGS.eos_token_id))
    return int(ends.any(-1).sum())


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_batches_report_answers_that_have_ended_by_token(engine, captured):
    with graphs_on_cpu() if captured else contextlib.nullcontext():
        decoded, reports = decode((with_graphs if captured else HybridEngine)(engine))
    for number, found in enumerate(decoded, 1):
        of_batch = [counts for counts in reports if counts["batch"] == (number, 2)]
        tokens = [counts["token"][0] for counts in of_batch]
        assert len(tokens) > 3 and tokens == list(range(tokens[0], tokens[-1] + 1))
        for counts in of_batch:
            token, num_new = counts["token"]
            assert num_new == 40
            assert counts["answers"] == (ended_after(found.tokens, token), len(found.tokens))
    assert reports[-1]["answers"][0] > 0


def test_transformers_generate_reports_tokens(engine):
    _, reports = decode(PlainGenerator(engine))
    tokens = [counts["token"] for counts in reports if counts["batch"] == (2, 2)]
    assert tokens == [(done, 40) for done in range(len(tokens))]


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_slots_report_answers_of_all_batches(engine, captured):
    with graphs_on_cpu() if captured else contextlib.nullcontext():
        _, reports = decode((with_graphs if captured else HybridEngine)(engine, slots=3))
    assert {tuple(counts) for counts in reports} == {("answers",)}
    ended, totals = zip(*(counts["answers"] for counts in reports))
    assert set(totals) == {16} and list(ended) == sorted(ended)
    assert ended[0] <= 3 and ended[-1] == 16
