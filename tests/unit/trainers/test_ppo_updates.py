"""Updates of step 3 in micro-batches of like length are those in micro-batches of equal rows."""

from types import SimpleNamespace

import pytest
import torch

from dschat.algorithms.types import Experience, TextBatch
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.models.causal_lm import load_causal_lm
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from dschat.trainers import ppo
from dschat.trainers.ppo_metrics import UpdateTotals
from tests.unit.models_helpers import FAMILIES, ModelAsEngine, pad, random_texts, tiny

PROMPTS, ANSWERS = (9, 3, 12, 5, 2, 7, 4, 11), (4, 15, 1, 7, 10, 2, 3, 6)
TOKENS = 30
SIZES = (
    "--per_device_generation_batch_size 8 --per_device_training_batch_size 2 "
    "--gradient_accumulation_steps 2 --max_prompt_seq_len 12 --max_answer_seq_len 15"
)


class Engine(ModelAsEngine):
    """A model with the bookkeeping of a DeepSpeed engine, which divides by accumulation steps."""

    device = torch.device("cpu")

    def __init__(self, model, *, accumulation: int):
        super().__init__(model)
        self.accumulation = accumulation
        self.boundaries = []

    def gradient_accumulation_steps(self):
        return self.accumulation

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.boundaries.append(is_boundary)

    def backward(self, loss):
        (loss / self.accumulation).backward()

    def step(self):
        assert not self.boundaries[-1]


class Check:
    """Stands for GradientCheck: nothing steps, so that gradients of updates can be compared."""

    finite = True

    def __init__(self, *engines, measured):
        self.measured = measured.tolist()

    def step(self):
        pass


def experience() -> Experience:
    prompts, prompt_mask = pad(random_texts(PROMPTS), side="left", pad_id=1)
    answers, mask = pad(random_texts(ANSWERS, seed=5), side="right", pad_id=1)
    generator = torch.Generator().manual_seed(0)
    columns = {
        name: torch.randn(mask.shape, generator=generator) * mask
        for name in ("ref_logprobs", "values", "rewards", "advantages", "returns")
    }
    # Answer 5 is not learned, as with --mask_truncated.
    learned = mask.bool() & (torch.arange(8) != 5)[:, None]
    return Experience(
        input_ids=torch.cat([prompts, answers], -1),
        attention_mask=torch.cat([prompt_mask, mask], -1),
        response_mask=mask.bool(),
        loss_mask=learned,
        importance=torch.ones(mask.shape),
        logprobs=-3.0 * mask,
        scores=torch.arange(8.0),
        **columns,
    )


def make_trainer(family: str, flags: str = "", *, ptx=None) -> ppo.DeepSpeedPPOTrainer:
    folder = tiny(family, std=0.1)
    words = f"--actor_model_name_or_path {folder} --critic_model_name_or_path {folder} {SIZES}"
    config = parse_config(PPOConfig, f"{words} {flags}".split())
    load = dict(dtype=torch.float32, dropout=0.0)
    steps = config.batch.layout(config.schedule.gradient_accumulation_steps)[1]
    actor = Engine(load_causal_lm(folder, **load), accumulation=steps)
    torch.manual_seed(0)
    critic = Engine(
        load_reward_model(folder, tokenizer=load_tokenizer(folder), **load), accumulation=steps
    )
    engines = SimpleNamespace(
        actor=actor, critic=critic, trained=[actor, critic], train=lambda: None
    )
    return ppo.DeepSpeedPPOTrainer(
        engines, config, lambda _: None, eos_token_ids=(2,), pad_token_id=1, ptx=ptx
    )


def update(trainer, window) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the metrics of an update, and its gradients."""
    totals = UpdateTotals()
    found = {}
    for role in ("actor", "critic"):
        engine = getattr(trainer.engines, role)
        engine.zero_grad()
        engine.boundaries.clear()
    trainer.optimizer_step(window, totals)
    for role in ("actor", "critic"):
        parameters = getattr(trainer.engines, role).named_parameters()
        found |= {f"{role}.{name}": p.grad for name, p in parameters if p.grad is not None}
    return totals.means(), {name: gradient.clone() for name, gradient in found.items()}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for role in ("actor", "critic"):
        largest = max(g.abs().max() for name, g in expected.items() if name.startswith(role))
        assert largest > 1e-4
        for name in expected:
            if name.startswith(role):
                assert (found[name] - expected[name]).abs().max() <= 1e-5 * largest, name


@pytest.fixture(autouse=True)
def no_steps(monkeypatch):
    monkeypatch.setattr(ppo, "GradientCheck", Check)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_does_not_depend_on_the_grouping(family):
    aggregation = "sequence" if family == "opt" else "token"
    flags = f"--loss_aggregation {aggregation} --entropy_coef 0.1"
    plain = make_trainer(family, flags)
    grouped = make_trainer(family, f"{flags} --training_tokens_per_batch {TOKENS}")
    grouped.engines = plain.engines
    updates = zip(plain._windows(experience()), grouped._windows(experience()), strict=True)
    counts, shares = [], []
    for window, groups in updates:
        expected_metrics, expected = update(plain, window)
        for engine in plain.engines.trained:
            engine.accumulation = 4
        metrics, found = update(grouped, groups)
        for engine in plain.engines.trained:
            assert engine.boundaries == [False] * (len(groups) - 1) + [True]
            engine.accumulation = 2
        check_equal(found, expected)
        counts.append(len(groups))
        shares.append((metrics.pop("train/real_tokens"), expected_metrics.pop("train/real_tokens")))
        for name in ("policy/micro_batches", "value/micro_batches"):
            assert metrics.pop(name) == len(groups) and expected_metrics.pop(name) == 2
        assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)
        assert metrics["policy/updates"] == metrics["value/updates"] == 1
    assert len(counts) == 2 and max(counts) > 2
    assert all(found > expected for found, expected in shares)


def test_an_update_has_the_same_rows_and_few_columns():
    plain = make_trainer("llama", "--ppo_epochs 2")
    grouped = make_trainer("llama", f"--ppo_epochs 2 --training_tokens_per_batch {TOKENS}")
    updates = list(zip(plain._windows(experience()), grouped._windows(experience()), strict=True))
    assert len(updates) == 4
    for window, groups in updates:
        rows, same = (sorted(torch.cat([b.scores for b in w]).tolist()) for w in (window, groups))
        assert rows == same and len(set(rows)) == 4
        assert all(batch.input_ids.numel() <= TOKENS for batch in groups)
        for batch in (*window, *groups):
            assert batch.attention_mask[:, 0].any() and batch.response_mask[:, -1].any()
        assert all(batch.attention_mask[:, 0].all() for batch in groups)
    assert [len(batch.scores) for window, _ in updates for batch in window] == [2] * 8


def test_an_update_has_as_many_ptx_batches_however_it_is_grouped():
    texts = random_texts((6, 6, 6, 6))
    batches = [TextBatch(t[None], torch.ones(1, 6).long(), t[None]) for t in texts]
    plain = make_trainer("llama", ptx=iter(batches))
    grouped = make_trainer("llama", f"--training_tokens_per_batch {TOKENS}", ptx=iter(batches))
    _, expected = update(plain, next(plain._windows(experience())))
    groups = next(grouped._windows(experience()))
    metrics, found = update(grouped, groups)
    check_equal(found, expected)
    assert next(grouped.ptx) is next(plain.ptx) is batches[2]
    assert grouped.engines.actor.boundaries == [False] * (len(groups) + 1) + [True]
    assert metrics["ptx/loss"] > 0


def test_cutting_micro_batches_reads_lengths_from_the_device_once(monkeypatch):
    trainer = make_trainer("llama", f"--ppo_epochs 2 --training_tokens_per_batch {TOKENS}")
    read = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: read.append(t.shape) or to_list(t))
    for name in ("__int__", "__bool__", "__float__", "item"):
        monkeypatch.setattr(torch.Tensor, name, lambda _: pytest.fail("reads a single number"))
    assert len(list(trainer._windows(experience()))) == 4
    # The lengths, and the order of each epoch, which is drawn on the host.
    assert read == [(2, 8), (2, 4), (2, 4)]
