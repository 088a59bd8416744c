"""DPO: loss, objective against a plain loop in float64, reference policy and memory plan."""

import copy
import math

import pytest
import torch

from dschat.algorithms.losses import (
    dpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    robust_dpo_loss,
)
from dschat.config.dpo import DPOConfig
from dschat.config.parse import parse_config
from dschat.data.collate import collate_pairs
from dschat.demo.tiny_models import make_tiny_model
from dschat.memory.advice import Machine, find_remedy
from dschat.memory.plan import plan_step
from dschat.models.causal_lm import load_causal_lm
from dschat.models.lora import add_lora
from dschat.trainers.dpo import DPOObjective

EOS = 2
BETA, SMOOTHING = 0.7, 0.2
# Answers and prompts of unequal lengths; the end token also occurs inside texts.
ITEMS = [
    {"chosen_ids": [9, 5, 6, 7, EOS], "rejected_ids": [9, 5, EOS], "num_prompt": 2},
    {"chosen_ids": [8, EOS], "rejected_ids": [8, 11, 12, 13, 14, EOS], "num_prompt": 1},
    {"chosen_ids": [4, EOS, 5, 6, 10, EOS], "rejected_ids": [4, EOS, 5, 6, 20], "num_prompt": 4},
]


class PlainEngine:
    """A model that is called like an engine."""

    def __init__(self, model):
        self.module, self.device = model, torch.device("cpu")

    def __call__(self, **inputs):
        return self.module(**inputs)

    def train(self, mode=True):
        self.module.train(mode)

    def eval(self):
        self.module.eval()


def noisy_copy(model, seed: int = 0):
    """Return a copy of the model with slightly different weights."""
    draw = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=draw).to(p.dtype))
    return other


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp(request.param), family=request.param, std=0.5)
    return load_causal_lm(str(path), dtype=torch.float32, dropout=0.0)


def plain_logprob(model, ids: list[int], num_prompt: int) -> torch.Tensor:
    """Return the logprob of one answer, without padding, a token at a time."""
    table = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(table[t - 1, ids[t]] for t in range(num_prompt, len(ids)))


def plain_pairs(policy, reference) -> list[dict]:
    """Return rewards, logprobs and the loss of each item."""
    found = []
    for item in ITEMS:
        logprobs, rewards = [], []
        for key in ("chosen_ids", "rejected_ids"):
            logprobs.append(plain_logprob(policy, item[key], item["num_prompt"]))
            with torch.no_grad():
                ref_logprob = plain_logprob(reference, item[key], item["num_prompt"])
            rewards.append(BETA * (logprobs[-1] - ref_logprob))
        p = 1 / (1 + torch.exp(rewards[1] - rewards[0]))
        loss = -(1 - SMOOTHING) * torch.log(p) - SMOOTHING * torch.log(1 - p)
        keys = ("chosen_ids", "rejected_ids")
        lengths = [len(item[key]) - item["num_prompt"] for key in keys]
        found.append({"loss": loss, "rewards": rewards, "logprobs": logprobs, "lengths": lengths})
    return found


def test_the_loss_by_hand():
    # beta 0.1 and log ratios 3 and -1: rewards 0.3 and -0.1;
    # -log sigmoid(0.4) = 0.5130153, -log sigmoid(-0.4) = 0.9130153
    chosen = implicit_rewards(torch.tensor([-5.0, -2.0]), torch.tensor([-8.0, -2.0]), beta=0.1)
    rejected = implicit_rewards(torch.tensor([-7.0, -4.0]), torch.tensor([-6.0, -4.0]), beta=0.1)
    torch.testing.assert_close(chosen, torch.tensor([0.3, 0.0]))
    torch.testing.assert_close(rejected, torch.tensor([-0.1, 0.0]))
    plain = dpo_loss(chosen, rejected, label_smoothing=0.0)
    torch.testing.assert_close(plain, torch.tensor([0.5130153, math.log(2)]))
    smooth = dpo_loss(chosen, rejected, label_smoothing=0.1)
    torch.testing.assert_close(
        smooth, torch.tensor([0.9 * 0.5130153 + 0.1 * 0.9130153, math.log(2)])
    )
    # With smoothing e the best margin is log((1 - e) / e), not infinity.
    margin = torch.tensor([math.log(9.0)], dtype=torch.float64, requires_grad=True)
    dpo_loss(margin, torch.zeros(1), label_smoothing=0.1).sum().backward()
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_the_other_losses_by_hand():
    chosen, rejected = torch.tensor([0.3, 2.0]), torch.tensor([-0.1, 0.5])
    # Margins 0.4 and 1.5: the second pair is beyond the hinge.
    torch.testing.assert_close(hinge_loss(chosen, rejected), torch.tensor([0.6, 0.0]))
    # beta 0.25 asks for a difference of 2.
    torch.testing.assert_close(
        ipo_loss(chosen, rejected, beta=0.25), torch.tensor([1.6**2, 0.5**2])
    )
    # -log sigmoid(0.4) = 0.5130153, of -0.4 0.9130153; of 1.5 0.2014133, of -1.5 1.7014133
    expected = [
        (0.9 * 0.5130153 - 0.1 * 0.9130153) / 0.8,
        (0.9 * 0.2014133 - 0.1 * 1.7014133) / 0.8,
    ]
    robust = robust_dpo_loss(chosen, rejected, label_smoothing=0.1)
    torch.testing.assert_close(robust, torch.tensor(expected))


def test_the_robust_loss_has_no_bias_from_swapped_pairs():
    chosen, rejected = torch.tensor([0.3, -2.0]), torch.tensor([-0.1, 0.5])
    right = robust_dpo_loss(chosen, rejected, label_smoothing=0.2)
    swapped = robust_dpo_loss(rejected, chosen, label_smoothing=0.2)
    torch.testing.assert_close(
        0.8 * right + 0.2 * swapped, dpo_loss(chosen, rejected, label_smoothing=0.0)
    )


def plain_loss(pair: dict, loss_type: str) -> torch.Tensor:
    """Return one pair's loss from its rewards and the lengths of its answers."""
    chosen, rejected = pair["rewards"]
    if loss_type == "ipo":
        difference = chosen / BETA / pair["lengths"][0] - rejected / BETA / pair["lengths"][1]
        return (difference - 1 / (2 * BETA)) ** 2
    if loss_type == "hinge":
        return torch.clamp(1 - chosen + rejected, min=0)
    p = torch.sigmoid(chosen - rejected)
    smoothed = (1 - SMOOTHING) * torch.log(p) - SMOOTHING * torch.log(1 - p)
    return -smoothed / (1 - 2 * SMOOTHING)


@pytest.mark.parametrize("loss_type", ["ipo", "hinge", "robust"])
def test_the_loss_type_is_trained_and_evaluated(model, loss_type):
    policy = noisy_copy(model)
    objective = DPOObjective(
        PlainEngine(model), beta=BETA, label_smoothing=SMOOTHING, loss_type=loss_type
    )
    batch = collate_pairs(ITEMS, EOS)
    loss, _ = objective.loss_sum(PlainEngine(policy), batch)
    with torch.no_grad():
        pairs = plain_pairs(copy.deepcopy(policy).double(), copy.deepcopy(model).double())
        expected = sum(plain_loss(pair, loss_type) for pair in pairs).item()
    assert loss.requires_grad and loss.item() == pytest.approx(expected, rel=1e-4)
    found = objective.evaluate(PlainEngine(policy), [batch], num_rows=len(ITEMS))
    assert found["eval/loss"] == pytest.approx(expected / len(ITEMS), rel=1e-4)


def test_large_margins_stay_finite():
    loss = dpo_loss(
        torch.tensor([400.0, -400.0]), torch.tensor([-400.0, 400.0]), label_smoothing=0.0
    )
    assert loss.tolist() == [0.0, 800.0]


def test_the_objective_equals_a_plain_loop_in_float64(model):
    policy, reference = noisy_copy(model), copy.deepcopy(model)
    objective = DPOObjective(PlainEngine(reference), beta=BETA, label_smoothing=SMOOTHING)
    batch = collate_pairs(ITEMS, EOS)  # the padding token is the end token
    loss, logged = objective.loss_sum(PlainEngine(policy), batch)
    loss.backward()
    exact = copy.deepcopy(policy).double()
    exact.zero_grad()
    pairs = plain_pairs(exact, copy.deepcopy(reference).double())
    expected = sum(pair["loss"] for pair in pairs)
    expected.backward()
    assert objective.weight(batch) == len(ITEMS)
    # Llama's norms compute in fp32 even in a float64 model.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    columns = {
        "rewards/chosen": [pair["rewards"][0] for pair in pairs],
        "rewards/rejected": [pair["rewards"][1] for pair in pairs],
        "rewards/margin": [pair["rewards"][0] - pair["rewards"][1] for pair in pairs],
        "rewards/accuracy": [pair["rewards"][0] > pair["rewards"][1] for pair in pairs],
        "logprobs/chosen": [pair["logprobs"][0] for pair in pairs],
        "logprobs/rejected": [pair["logprobs"][1] for pair in pairs],
    }
    assert set(logged) == set(columns)
    for key, values in columns.items():
        assert logged[key].item() == pytest.approx(sum(values).item(), rel=1e-4, abs=1e-4), key
    for name, p in policy.named_parameters():
        right = exact.get_parameter(name).grad
        # Rounding in fp32 differs between processors and is relative to the largest summands.
        assert (p.grad.double() - right).norm() <= 2e-4 * right.norm(), name
    assert all(p.grad is None for p in reference.parameters())


def test_evaluation_covers_all_batches_without_rows_that_wrap_around(model):
    policy = noisy_copy(model)
    objective = DPOObjective(PlainEngine(model), beta=BETA, label_smoothing=SMOOTHING)
    # Batches of two: the last one repeats the first item, which must not be counted.
    batches = [collate_pairs(ITEMS[:2], EOS), collate_pairs([ITEMS[2], ITEMS[0]], EOS)]
    found = objective.evaluate(PlainEngine(policy), batches, num_rows=len(ITEMS))
    with torch.no_grad():
        pairs = plain_pairs(copy.deepcopy(policy).double(), copy.deepcopy(model).double())
    margins = [float(pair["rewards"][0] - pair["rewards"][1]) for pair in pairs]
    assert found["eval/loss"] == pytest.approx(
        sum(float(pair["loss"]) for pair in pairs) / 3, rel=1e-4
    )
    assert found["eval/margin"] == pytest.approx(sum(margins) / 3, rel=5e-4)
    assert found["eval/accuracy"] == sum(margin > 0 for margin in margins) / 3
    assert found["eval/rejected_logprob"] == pytest.approx(
        sum(float(pair["logprobs"][1]) for pair in pairs) / 3, rel=1e-5
    )
    assert found["eval/chosen_reward"] == pytest.approx(
        sum(float(pair["rewards"][0]) for pair in pairs) / 3, rel=1e-4
    )
    # If policy and reference are the same, so are the rewards of a pair: a tie, counted as wrong.
    same = objective.evaluate(PlainEngine(model), batches, num_rows=len(ITEMS))
    assert (same["eval/margin"], same["eval/accuracy"]) == (0.0, 0.0)
    assert same["eval/loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("training", [True, False])
def test_a_shared_reference_has_neither_adapters_nor_dropout(training, tmp_path):
    path = str(make_tiny_model(tmp_path, family="opt", std=0.5))
    start = load_causal_lm(path, dtype=torch.float32, dropout=0.0).eval()
    policy = load_causal_lm(path, dtype=torch.float32, dropout=0.3)
    add_lora(policy, dim=4, alpha=16, only_optimize_lora=True)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.fill_(0.05)
    policy.train(training)
    objective = DPOObjective(None, beta=BETA, label_smoothing=0.0)
    batch = collate_pairs(ITEMS, EOS)
    logprobs, ref_logprobs, _ = objective._logprobs(PlainEngine(policy), batch)
    assert policy.training == training
    rows = [
        (item[key], item["num_prompt"]) for key in ("chosen_ids", "rejected_ids") for item in ITEMS
    ]
    with torch.no_grad():
        expected = torch.stack([plain_logprob(start, *row) for row in rows])
    torch.testing.assert_close(ref_logprobs, expected, rtol=1e-5, atol=1e-5)
    assert not ref_logprobs.requires_grad and logprobs.requires_grad
    again, *_ = objective._logprobs(PlainEngine(policy), batch)
    assert torch.equal(again, logprobs) != training  # dropout stays in the policy's training
    assert not torch.allclose(logprobs, ref_logprobs)


def planned(flags: str, world_size: int = 1):
    config = parse_config(DPOConfig, f"--model_name_or_path llama-2-7b {flags}".split())
    return plan_step(config, world_size=world_size, dtype="bf16")


def test_the_plan_holds_the_reference_unless_it_is_shared():
    weights = 2 * 6_738_415_616
    both = planned("--zero_stage 2")
    assert both.models["reference"].weights == weights
    assert planned("--zero_stage 3", world_size=8).models["reference"].weights == weights / 8
    shared = planned("--lora_dim 8 --only_optimize_lora")
    apart = planned("--lora_dim 8 --only_optimize_lora --no_share_reference")
    assert set(shared.models) == {"model"} and set(apart.models) == {"model", "reference"}
    assert {
        phase: apart.phases[phase] - shared.phases[phase] for phase in shared.phases
    } == dict.fromkeys(shared.phases, pytest.approx(weights))
    offloaded = planned("--zero_stage 2 --offload_reference_model --no_pin_memory")
    assert (
        offloaded.models["reference"].weights == 0 and offloaded.models["reference"].host == weights
    )
    assert both.phases["step"] - offloaded.phases["step"] > 0.9 * weights


def test_offloading_the_reference_is_among_the_remedies():
    flags = "--gradient_checkpointing --offload --zero_stage 3 --per_device_train_batch_size 1"
    flags += " --per_device_eval_batch_size 1"
    config = parse_config(DPOConfig, f"--model_name_or_path llama-2-7b {flags}".split())
    peak = planned(flags).peak[1]
    assert find_remedy(config, Machine(1, 1, peak, 0), dtype="bf16").flags == [
        "--offload_reference_model"
    ]
