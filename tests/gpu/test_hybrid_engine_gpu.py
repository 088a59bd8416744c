"""The Hybrid Engine on a GPU: its attention kernel, and captured decoding against generate."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import GenerationConfig

from dschat.config.options import ScheduleOptions, SystemOptions
from dschat.demo.tiny_models import make_tiny_model
from dschat.engine.build import build_training_engine, partitioned_loading, start_processes
from dschat.engine.ds_config import training_config
from dschat.engine.hybrid_engine import HybridEngine, PlainGenerator
from dschat.engine.optim import step_together
from dschat.generation import cuda_graphs
from dschat.generation.kernels.attention import decode_attention
from dschat.generation.kernels.linear import skinny_linear
from dschat.generation.kernels.sample import draw as fused_draw
from dschat.generation.sampling import row_noise
from dschat.generation.tensor_parallel import TensorGroup
from dschat.models.causal_lm import load_causal_lm
from dschat.models.families import FAMILIES
from dschat.models.forward import forward_logits
from dschat.models.lora import add_lora, lora_parameter_names

pytestmark = pytest.mark.gpu

LENGTHS = (3, 90, 20, 70, 5, 66, 33, 1)  # prompts, of eight lengths
PROMPT, ANSWER = 90, 40
ENDS = list(range(5, 45, 3))  # many tokens end an answer, so that lengths differ


@pytest.fixture(scope="module")
def device() -> torch.device:
    return start_processes()


def prompts(device) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (len(LENGTHS), PROMPT), generator=draw)
    mask = (torch.arange(PROMPT) >= PROMPT - torch.tensor(LENGTHS)[:, None]).long()
    return (ids * mask).to(device), mask.to(device)


def greedy(**more) -> GenerationConfig:
    settings = dict(
        do_sample=False,
        max_new_tokens=ANSWER,
        eos_token_id=ENDS,
        pad_token_id=0,
        num_return_sequences=1,
    )
    return GenerationConfig(**{**settings, **more})


def answers(tokens: torch.Tensor) -> list[list[int]]:
    """Return each answer up to its end."""
    rows = []
    for row in tokens.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ENDS), len(row))
        rows.append(row[:end])
    return rows


def tiny(tmp_path, family: str, dtype=torch.float32, **sizes) -> torch.nn.Module:
    path = make_tiny_model(tmp_path / family, family=family, **{"std": 0.5, **sizes})
    return load_causal_lm(str(path), dtype=dtype, dropout=0.0)


def stand_in(model, device):
    """Return the part of an engine that a generator needs, around a plain module."""
    model = model.to(device).eval()
    return SimpleNamespace(
        module=model,
        device=device,
        global_steps=0,
        eval=model.eval,
        zero_optimization_stage=lambda: 0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "heads, kv_heads, width", [(4, 4, 64), (8, 2, 128), (9, 3, 64), (4, 4, 80), (32, 1, 96)]
)
def test_the_kernel_attends_within_its_bounds(heads, kv_heads, width, dtype, device):
    draw = torch.Generator(device).manual_seed(1)
    q = torch.randn(5, heads, 1, width, generator=draw, device=device).to(dtype)
    k, v = (
        torch.randn(6, kv_heads, 1100, width, generator=draw, device=device).to(dtype)[:5]
        for _ in range(2)
    )
    bounds = torch.tensor(
        [[0, 1100], [7, 8], [1000, 1037], [64, 128], [3, 700]], dtype=torch.int32, device=device
    )
    new = [
        torch.randn(5, kv_heads, 1, width, generator=draw, device=device).to(dtype)
        for _ in range(2)
    ]
    expected = [t.clone() for t in (k, v)]
    for row, (_, end) in enumerate(bounds.tolist()):
        for cache, token in zip(expected, new):
            cache[row, :, end - 1] = token[row, :, 0]
    found = decode_attention(q, k, v, *new, bounds.view(5, 1, 1, 2), 0.3)
    assert torch.equal(k, expected[0]) and torch.equal(v, expected[1])
    for row, (first, end) in enumerate(bounds.tolist()):
        keys, values = (
            t[row, :, first:end].double().repeat_interleave(heads // kv_heads, 0) for t in (k, v)
        )
        weights = (0.3 * q[row].double() @ keys.transpose(-1, -2)).softmax(-1)
        gap = (found[row].double() - weights @ values).abs().max().item()
        assert gap < {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype], (
            row,
            gap,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [7, 2048, 32000, 50272])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_draws_are_those_of_torch(vocab, temperature, dtype, device):
    draw = torch.Generator(device).manual_seed(3)
    logits = (3 * torch.randn(16, vocab, generator=draw, device=device)).to(dtype)
    logits[0, : vocab // 2] = -float("inf")
    noise = torch.empty(16, vocab, device=device).exponential_(generator=draw)
    tokens, logprobs = fused_draw(logits, noise, temperature)
    scores = logits.float() / temperature
    # In half precision scores tie, so the last bit of the noise may decide.
    perturbed = scores - noise.log()
    chosen = perturbed.gather(-1, tokens[:, None])[:, 0]
    best = perturbed.amax(-1)
    assert (best - chosen).max().item() < 1e-5
    gap = (logprobs - scores.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]).abs().max().item()
    assert gap < 2e-5
    assert tokens.unique().numel() > 3


def test_noise_of_rows_is_exponential_and_each_row_has_its_own(device):
    seed = torch.tensor([2**61 + 5], device=device)
    rows = torch.arange(4000, device=device)
    noise = row_noise(seed, rows, torch.zeros_like(rows), 3000)
    assert (noise > 0).all() and len(noise[:, :8].unique(dim=0)) == 4000
    # Kolmogorov and Smirnov: 1.95 is passed once in a thousand draws.
    uniform = (-torch.expm1(-noise.double())).flatten().sort().values
    grid = torch.linspace(0, 1, uniform.numel(), dtype=torch.float64, device=device)
    assert (uniform - grid).abs().max().item() * uniform.numel() ** 0.5 < 1.95
    seventh = row_noise(seed, rows[7:8], rows[3:4], 3000)
    both = row_noise(seed, rows[6:8], rows[3:4].expand(2), 3000)
    assert torch.equal(both[1:], seventh) and not torch.equal(both[0], both[1])


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_slots_are_those_of_generate(family, compiled, device, tmp_path):
    engine = stand_in(tiny(tmp_path, family), device)
    ids, mask = prompts(device)
    batches = [(ids, mask), (ids[:5, 20:], mask[:5, 20:])]
    plain = PlainGenerator(engine).decode_all(batches, greedy())
    expected = [row for batch in plain for row in answers(batch.tokens)]
    for slots in (3, 8, 40):
        hybrid = HybridEngine(engine, compiled=compiled, slots=slots)
        for _ in range(2):
            found = hybrid.decode_all(batches, greedy())
            assert [row for batch in found for row in answers(batch.tokens)] == expected
        assert hybrid._decoder is not None, "the captured steps should pass their check"
        assert (hybrid.metrics()["rollout/refills"] > 0) == (slots < 13)
        hybrid.shutdown()


def test_samples_do_not_depend_on_the_slots(device, tmp_path):
    engine = stand_in(tiny(tmp_path, "llama"), device)
    settings = greedy(do_sample=True, top_k=0, num_return_sequences=4)
    found = []
    for slots in (3, 16, 32):
        hybrid = HybridEngine(engine, slots=slots)
        torch.manual_seed(1)
        found.append(answers(hybrid.decode(*prompts(device), settings).tokens))
        hybrid.shutdown()
    assert found[0] == found[1] == found[2]


def test_a_call_with_more_rows_captures_again(device, tmp_path):
    engine = stand_in(tiny(tmp_path, "llama"), device)
    ids, mask = prompts(device)
    plain = PlainGenerator(engine)
    for slots in (0, 8):
        hybrid = HybridEngine(engine, slots=slots)
        for copies in (1, 4):
            many = (ids.repeat(copies, 1), mask.repeat(copies, 1))
            expected = answers(plain.decode(*many, greedy()).tokens)
            assert answers(hybrid.decode(*many, greedy()).tokens) == expected
            assert hybrid._decoder is not None
        hybrid.shutdown()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 16])
@pytest.mark.parametrize(
    "inner, widths", [(4096, (4096,)), (576, (576, 192, 192)), (136, (9000, 9000)), (11008, (100,))]
)
@pytest.mark.parametrize("biased", [False, True])
def test_skinny_products_are_products(inner, widths, rows, biased, dtype, device):
    draw = torch.Generator(device).manual_seed(2)
    x = torch.randn(rows, inner, generator=draw, device=device).to(dtype)
    weights = [torch.randn(n, inner, generator=draw, device=device).to(dtype) for n in widths]
    biases = [
        torch.randn(n, generator=draw, device=device).to(dtype) if biased else None for n in widths
    ]
    for weight, bias, found in zip(weights, biases, skinny_linear(x, weights, biases)):
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        gap = ((found.double() - expected).norm() / expected.norm()).item()
        assert gap < {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_steps_are_checked_and_pass(family, compiled, device, tmp_path):
    """The half-precision products are our kernels; if one were wrong, the check of the first step
    would drop the graphs.
    """
    engine = stand_in(tiny(tmp_path, family, dtype=torch.bfloat16, std=0.1), device)
    ids, mask = prompts(device)
    hybrid = HybridEngine(engine, compiled=compiled)
    decoded = hybrid.decode(ids, mask, greedy())
    assert hybrid._decoder is not None and hybrid._decoder.graphs.captures > 0
    assert logprob_gap(engine.module, ids, mask, decoded) < 0.05


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate(family, compiled, device, tmp_path):
    engine = stand_in(tiny(tmp_path, family), device)
    ids, mask = prompts(device)
    hybrid = HybridEngine(engine, compiled=compiled)
    expected = answers(PlainGenerator(engine).decode(ids, mask, greedy()).tokens)
    assert len({len(row) for row in expected}) > 3, "the answers should differ in length"
    assert max(len(set(row)) for row in expected) >= 8
    for _ in range(2):
        assert answers(hybrid.decode(ids, mask, greedy()).tokens) == expected
    assert hybrid._decoder is not None
    captures = hybrid._decoder.graphs.captures
    assert captures > 1, "finished rows should have been dropped"
    # Other prompts of other lengths use the same graphs.
    expected = answers(PlainGenerator(engine).decode(ids[:, 20:], mask[:, 20:], greedy()).tokens)
    assert answers(hybrid.decode(ids[:, 20:], mask[:, 20:], greedy()).tokens) == expected
    # Fewer rows, and the same again, need no more buffers.
    expected = answers(PlainGenerator(engine).decode(ids[2:5], mask[2:5], greedy()).tokens)
    assert answers(hybrid.decode(ids[2:5], mask[2:5], greedy()).tokens) == expected
    captured = hybrid._decoder.graphs.captures
    assert answers(hybrid.decode(ids[2:5], mask[2:5], greedy()).tokens) == expected
    assert hybrid._decoder.graphs.captures == captured


def test_a_step_that_caches_nothing_is_noticed(device, tmp_path, monkeypatch):
    """The logits of the first step are right even so; those of the next would not be."""
    engine = stand_in(tiny(tmp_path, "llama"), device)
    ids, mask = prompts(device)
    kernel = cuda_graphs.attention.decode_attention

    def on_copies(query, key, value, *rest):
        return kernel(query, key.clone(), value.clone(), *rest)

    monkeypatch.setattr(cuda_graphs.attention, "decode_attention", on_copies)
    hybrid = HybridEngine(engine, compiled=False)
    expected = answers(PlainGenerator(engine).decode(ids, mask, greedy()).tokens)
    assert answers(hybrid.decode(ids, mask, greedy()).tokens) == expected
    assert hybrid._decoder is None, "graphs should be off"


def test_copies_of_a_prompt_and_logits_processors(device, tmp_path):
    engine = stand_in(tiny(tmp_path, "llama"), device)
    ids, mask = prompts(device)
    hybrid = HybridEngine(engine, compiled=False)
    plain = PlainGenerator(engine)
    config = greedy(num_return_sequences=2, do_sample=True, top_k=1, temperature=0.7)
    assert answers(hybrid.decode(ids, mask, config).tokens) == answers(
        plain.decode(ids, mask, config).tokens
    )
    config = greedy(repetition_penalty=1.4, min_new_tokens=6)
    expected = answers(plain.decode(ids, mask, config).tokens)
    assert (
        answers(hybrid.decode(ids, mask, config).tokens)
        == expected
        != answers(plain.decode(ids, mask, greedy()).tokens)
    )


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_samples_follow_the_models_distribution(graph, device, tmp_path):
    """Chi-square of the second token's counts against its exact distribution, summed over all first
    tokens.
    """
    model = tiny(tmp_path, "llama", vocab_size=264)
    engine = stand_in(model, device)
    ids, mask = (t[:1] for t in prompts(device))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # std 0.5 makes one token certain
    config = greedy(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        num_return_sequences=2000,
        max_new_tokens=2,
        eos_token_id=[],
    )
    torch.manual_seed(5)
    hybrid = HybridEngine(engine, cuda_graph=graph, compiled=False)
    found = torch.cat([hybrid.decode(ids, mask, config).tokens for _ in range(10)])
    counts = torch.bincount(found[:, 1], minlength=264).double().cpu()
    expected = (second_token_distribution(model, ids, mask) * counts.sum()).clamp(min=1e-9)
    common = expected >= 5
    pooled = torch.stack(
        [torch.cat([t[common], t[~common].sum().clamp(min=1e-9)[None]]) for t in (counts, expected)]
    )
    chi2 = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum().item()
    degrees = common.sum().item()
    assert degrees > 50
    # The statistic has mean `degrees` and variance 2 x `degrees`.
    assert abs(chi2 - degrees) < 4 * (2 * degrees) ** 0.5, (chi2, degrees)
    # Sharp: the first token's distribution would not do for the second.
    wrong = (
        ((counts - torch.bincount(found[:, 0], minlength=264).cpu()) ** 2 / (expected + 1))
        .sum()
        .item()
    )
    assert wrong > 2 * chi2


def second_token_distribution(model, ids, mask) -> torch.Tensor:
    """Return [V] float64: the sum over first tokens of p(first) p(second | first), after one
    prompt.
    """
    with torch.no_grad():
        first = (
            forward_logits(model, model, input_ids=ids, attention_mask=mask)[0, -1]
            .double()
            .softmax(-1)
        )
        every = torch.arange(len(first), device=ids.device)[:, None]
        texts = torch.cat([ids.expand(len(first), -1), every], -1)
        masks = torch.cat([mask, mask[:, -1:]], -1).expand(len(first), -1)
        second = (
            forward_logits(model, model, input_ids=texts, attention_mask=masks)[:, -1]
            .double()
            .softmax(-1)
        )
    return (first[:, None] * second).sum(0).cpu()


@pytest.mark.parametrize(
    "zero, lora, offload, grouped",
    [
        (1, "", False, False),
        (2, "merge", False, False),
        (2, "attach", True, False),
        (3, "", False, False),
        (3, "merge", True, False),
        (3, "", False, True),
        (3, "merge", False, True),
    ],
)
def test_answers_follow_the_weights(zero, lora, offload, grouped, device, tmp_path):
    """Answers follow the weights before and after a step, and after the copies were freed.

    The training weights are not changed. A tensor-parallel group has one member here, but its sums
    and broadcasts are still NCCL's and are captured.
    """
    system = SystemOptions(zero_stage=zero, offload=offload)
    config = training_config(
        system,
        dtype="bf16",
        micro_batch_size=4,
        gradient_accumulation_steps=1,
        world_size=1,
        on_cpu=device.type == "cpu",
    )
    # In bf16 a merged weight is rounded; std 0.5 makes the model so steep that this alone shows.
    path = make_tiny_model(tmp_path / "llama", family="llama", std=0.1)
    with partitioned_loading(config):
        model = load_causal_lm(str(path), dtype=torch.bfloat16, dropout=0.0)
    if lora:
        add_lora(model, dim=4, alpha=16, only_optimize_lora=True)
    engine = build_training_engine(
        model,
        ds_config=config,
        schedule=ScheduleOptions(lr_scheduler_type="constant"),
        total_steps=4,
        learning_rate=0.05,
        weight_decay=0.0,
        lora_names=lora_parameter_names(model),
        lora_learning_rate=0.05,
    )
    ids, mask = prompts(device)
    group = TensorGroup(1, 0, 0, dist.new_group([0])) if grouped else None
    hybrid = HybridEngine(engine, lora_mode=lora or "auto", compiled=False, group=group)
    gaps, texts = [], []
    for step in range(3):
        before = {
            n: getattr(p, "ds_tensor", p).detach().clone()
            for n, p in engine.module.named_parameters()
        }
        decoded = hybrid.decode(ids, mask, greedy())
        again = hybrid.decode(ids, mask, greedy())
        assert torch.equal(decoded.tokens, again.tokens)
        after = {n: getattr(p, "ds_tensor", p) for n, p in engine.module.named_parameters()}
        assert all(torch.equal(before[n], after[n]) for n in before)
        texts.append(answers(decoded.tokens))
        gaps.append(logprob_gap(engine, ids, mask, decoded))
        if step == 1:
            hybrid.release_cache = True
            hybrid.end_rollout()
        engine.train()
        logits = forward_logits(engine, engine.module, input_ids=ids, attention_mask=mask)
        # Mask padding: after two updates on padding every answer would be padding.
        labels = ids.masked_fill(mask == 0, -100)
        engine.backward(
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            )
        )
        assert step_together(engine)
    assert texts[0] != texts[1] != texts[2]
    assert max(gaps) < 0.05, gaps
    assert hybrid._decoder is not None and hybrid._decoder.graphs.captures > 0


def logprob_gap(engine, ids, mask, decoded) -> float:
    """Return the mean |difference| between the generator's and the engine's logprobs of the
    samples.
    """
    live = torch.zeros_like(decoded.tokens, dtype=torch.bool)
    for row, answer in enumerate(answers(decoded.tokens)):
        live[row, : len(answer)] = True
    engine.eval()
    with torch.no_grad():
        logits = forward_logits(
            engine,
            getattr(engine, "module", engine),
            input_ids=torch.cat([ids, decoded.tokens], -1),
            attention_mask=torch.cat([mask, live.long()], -1),
        )[:, PROMPT - 1 : -1]
    logprobs = logits.float().log_softmax(-1).gather(-1, decoded.tokens[..., None]).squeeze(-1)
    return (logprobs - decoded.logprobs)[live].abs().mean().item()
