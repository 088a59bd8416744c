"""Functions for the worker: the Hybrid Engine against transformers' generate on the same engine."""

import torch
from engine_checks import here, training_engine
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PhiConfig,
    Qwen3Config,
    Starcoder2Config,
)

from dschat.engine.device import on_cpu
from dschat.engine.hybrid_engine import HybridEngine, PlainGenerator
from dschat.engine.optim import step_together
from dschat.engine.replica import LowRankLinear, lora_matrix
from dschat.engine.zero import gathered
from dschat.generation.tensor_parallel import tensor_group
from dschat.models.causal_lm import load_causal_lm
from dschat.models.forward import forward_logits
from dschat.models.lora import add_lora, lora_parameter_names
from dschat.runtime import dist
from tests.graph_stand_ins import graphs_on_cpu, with_graphs

PROMPT, ANSWER = 70, 24
LENGTHS = (3, 70, 20, 66, 5, 1)
ENDS = list(range(5, 264, 12))  # tokens that end an answer, so that lengths differ


def greedy_tokens(stock: str, *, family: str, zero: int, lora: str, offload: bool) -> dict:
    """Check greedy answers; every entry should be true.

    Args:
        lora: "", or how adapters get into the replica: "merge" or "attach".
    """
    engine = steep_engine(stock, family=family, zero=zero, lora=lora, offload=offload)
    hybrid = HybridEngine(engine, lora_mode=lora or "auto", compiled=False)
    plain = PlainGenerator(engine)
    before = held(engine)
    first, again, other = (g.decode(*prompts(), greedy()).tokens for g in (hybrid, hybrid, plain))
    untouched = all(torch.equal(before[name], tensor) for name, tensor in held(engine).items())
    step(engine)
    moved, expected = (g.decode(*prompts(), greedy()).tokens for g in (hybrid, plain))
    hybrid.unpin = True
    hybrid.end_rollout()
    freed = hybrid.decode(*prompts(), greedy()).tokens
    ids, mask = prompts()
    mask[1, 30] = 0
    hidden = hybrid.decode(ids, mask, greedy(eos_token_id=[])).tokens
    endless = hybrid.decode(*prompts(), greedy(eos_token_id=[])).tokens
    return {
        "as generate": answers(first) == answers(other),
        "twice in a row": torch.equal(first, again),
        "training weights untouched": untouched,
        "a step changes the answers": answers(expected) != answers(other),
        "as generate after a step": answers(moved) == answers(expected),
        "as generate after the copies were freed": torch.equal(freed, moved),
        "rows end early": len({len(row) for row in answers(first)}) > 1,
        # Two rows may have run into a short cycle.
        "many distinct tokens": sorted(len(set(row)) for row in endless.tolist())[2] >= 8,
        "a hidden position shows": not torch.equal(hidden[1], endless[1]),
        "others do not see it": torch.equal(hidden[2:], endless[2:]),
        "copied or shared as it should be": sharing_is_right(hybrid, zero=zero, lora=lora),
        "as generate in slots": slots_follow(engine, lora=lora, expected=expected),
        "as generate by captured steps": not on_cpu()
        or captured_steps_follow(engine, lora=lora, expected=expected),
    }


def captured_steps_follow(engine, *, lora: str, expected: torch.Tensor) -> bool:
    """Check captured decoding against generate with stand-in graphs, also after copies were freed
    and after a step.
    """
    with graphs_on_cpu():
        hybrid = with_graphs(engine, lora_mode=lora or "auto", unpin=True)
        first = hybrid.decode(*prompts(), greedy()).tokens
        hybrid.end_rollout()
        # Occupy the freed copies' memory, so that the new ones get other addresses.
        kept = [torch.empty_like(p) for p in hybrid.replica.model.parameters()]
        freed = hybrid.decode(*prompts(), greedy()).tokens
        step(engine)
        moved, plain = (
            g.decode(*prompts(), greedy()).tokens for g in (hybrid, PlainGenerator(engine))
        )
    del kept
    same = answers(first) == answers(freed) == answers(expected) and answers(moved) == answers(
        plain
    )
    return same and hybrid._decoder is not None


def slots_follow(engine, *, lora: str, expected: torch.Tensor) -> bool:
    """Check decoding in fewer slots than rows against generate, eager and by captured steps."""
    ids, mask = prompts()
    batches = [(ids[:4], mask[:4]), (ids[4:], mask[4:])]
    hybrid = HybridEngine(engine, lora_mode=lora or "auto", compiled=False, slots=2)
    found = [hybrid.decode_all(batches, greedy())]
    if on_cpu():
        with graphs_on_cpu():
            captured = with_graphs(engine, lora_mode=lora or "auto", slots=2)
            found.append(captured.decode_all(batches, greedy()))
    same = all(
        answers(torch.cat([batch.tokens for batch in batches])) == answers(expected)
        for batches in found
    )
    return same and hybrid.metrics()["rollout/refills"] > 0


def split_tokens(stock: str, *, family: str, lora: bool, gather_layers: int) -> dict:
    """Check greedy answers of a group of two ranks; every entry should be true.

    Args:
        gather_layers: decoder layers gathered at a time.
    """
    engine = steep_engine(stock, family=family, zero=3, lora="merge" if lora else "", offload=False)
    group = tensor_group(2)
    plain = PlainGenerator(engine)
    hybrid = HybridEngine(engine, group=group, gather_layers=gather_layers)
    reads = prompts_of_unlike_length()
    first, again, other = (g.decode(*reads, greedy()).tokens for g in (hybrid, hybrid, plain))
    step(engine)
    moved, expected = (g.decode(*reads, greedy()).tokens for g in (hybrid, plain))
    hybrid.unpin = True
    hybrid.end_rollout()
    freed = hybrid.decode(*reads, greedy()).tokens
    sampled = drawn_twice(hybrid, reads)
    return {
        "as generate": answers(first) == answers(other),
        "twice in a row": torch.equal(first, again),
        "a step changes the answers": answers(expected) != answers(other),
        "as generate after a step": answers(moved) == answers(expected),
        "as generate after the copies were freed": torch.equal(freed, moved),
        "sampled for every prompt": sampled.tokens.shape == (2 * len(LENGTHS), ANSWER),
        "logprobs are the training module's": logprob_gap(engine, *reads, sampled) < 1e-4,
        "slices give the weights": slices_give_the_weights(hybrid),
        "layers gathered at a time": gathers_are_right(hybrid, gather_layers),
        "as generate in slots": split_slots_follow(engine, group, reads, expected),
        "one rank's wrong slice stops all": wrong_slices_are_refused(engine, group),
        "as generate by captured steps": not on_cpu()
        or captured_steps_agree(engine, group, reads, expected),
    }


def split_slots_follow(engine, group, reads: tuple, expected: torch.Tensor) -> bool:
    """Check that a group decodes generate's tokens in slots, which its ranks refill together."""
    hybrid = HybridEngine(engine, group=group, compiled=False, slots=2)
    found = [hybrid.decode(*reads, greedy())]
    if on_cpu():
        with graphs_on_cpu():
            found.append(with_graphs(engine, group=group, slots=2).decode(*reads, greedy()))
    sampled = drawn_twice(hybrid, reads)
    same = all(answers(decoded.tokens) == answers(expected) for decoded in found)
    return same and logprob_gap(engine, *reads, sampled) < 1e-4


def drawn_twice(hybrid: HybridEngine, reads: tuple):
    """Draw two sampled answers to each prompt, as ``logprob_gap`` takes them."""
    torch.manual_seed(dist.rank())  # as a run does: ranks would draw differently
    return hybrid.decode(
        *reads, greedy(do_sample=True, temperature=2.0, eos_token_id=[], num_return_sequences=2)
    )


def captured_steps_agree(engine, group, reads: tuple, expected: torch.Tensor) -> bool:
    """Check with stand-in graphs that the group captures, drops ended rows and gives generate's
    tokens.
    """
    with graphs_on_cpu():
        hybrid = with_graphs(engine, group=group)
        found = [hybrid.decode(*reads, greedy()).tokens for _ in range(2)]
        sampled = drawn_twice(hybrid, reads)
    same = all(answers(tokens) == answers(expected) for tokens in found)
    return same and hybrid._decoder is not None and logprob_gap(engine, *reads, sampled) < 1e-4


def split_other_families(stock: str, *, out: str) -> dict:
    """Check families that only transformers' plans can split, on unlike prompts; all entries should
    be true.
    """
    sizes = dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=264,
    )
    sizes |= dict(
        intermediate_size=96,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    found = {}
    for make in (Qwen3Config, PhiConfig, Starcoder2Config):
        config = make(**sizes)
        folder = f"{out}/{make.model_type}"
        torch.manual_seed(1)
        if dist.is_main():
            model = AutoModelForCausalLM.from_config(config)
            for p in model.parameters():
                if p.dim() == 2:
                    torch.nn.init.normal_(p, std=0.5)
            model.save_pretrained(folder)
        dist.barrier()

        def load(path: str, **options):
            return load_causal_lm(folder, **options)

        engine = training_engine(
            f"{stock}/steep/llama", load, stock, zero=3, dtype="fp32", offload=False, accumulation=1
        )
        engine.eval()
        generators = (
            HybridEngine(engine, group=tensor_group(2), gather_layers=2),
            PlainGenerator(engine),
        )
        tokens = [g.decode(*prompts_of_unlike_length(), greedy()).tokens for g in generators]
        found[make.model_type] = answers(tokens[0]) == answers(tokens[1])
    return found


def wrong_slices_are_refused(engine, group) -> bool:
    hybrid = HybridEngine(engine, group=group)
    hybrid.replica.refresh()
    if dist.rank() == 1:
        next(w for w in hybrid.replica._copied if w.cut == 1).module.weight.data.zero_()
    try:
        hybrid.decode(*prompts(), greedy())
    except ValueError as error:
        return "computes something else than whole" in str(error)
    return False


def prompts_of_unlike_length() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``prompts``, on odd ranks without the long ones and their columns."""
    ids, mask = prompts()
    if dist.rank() % 2 == 0:
        return ids, mask
    ids = ids[:, -30:]
    mask = mask[:, -30:].clone()
    mask[mask.all(-1), :3] = 0
    return ids * mask, mask


def logprob_gap(engine, ids: torch.Tensor, mask: torch.Tensor, sampled) -> float:
    """Return the largest difference to the training module's logprobs, of two answers per prompt at
    temperature 2.
    """
    ids = ids.repeat_interleave(2, dim=0)
    mask = mask.repeat_interleave(2, dim=0)
    texts = torch.cat([ids, sampled.tokens], -1)
    masks = torch.cat([mask, torch.ones_like(sampled.tokens)], -1)
    with torch.no_grad():
        logits = forward_logits(engine, engine.module, input_ids=texts, attention_mask=masks)
    scaled = torch.log_softmax(logits[:, ids.shape[1] - 1 : -1] / 2.0, -1)
    expected = scaled.gather(-1, sampled.tokens[..., None]).squeeze(-1)
    return (sampled.logprobs - expected).abs().max().item()


def slices_give_the_weights(hybrid: HybridEngine) -> bool:
    """Check that the ranks' slices make up the training weights, adapter merged, and most layers
    are split.
    """
    replica = hybrid.replica
    group = hybrid.group
    right = True
    for weight in replica._copied:
        mine = group.gather(weight.module._parameters[weight.leaf].data)
        whole = mine[0] if weight.cut is None else torch.cat(list(mine), weight.cut)
        with gathered(weight.parts()):
            expected = weight.source.detach()
            if weight.lora is not None:
                a, b = (lora_matrix(weight.lora, name) for name in ("A", "B"))
                expected = expected + weight.lora.scaling["default"] * (b @ a)
            right &= torch.allclose(whole, expected, atol=1e-6)
    in_layers = [weight for weight in replica._copied if "layers." in weight.block]
    matrices = [weight for weight in in_layers if weight.source.ds_shape.numel() > 64 * 64 - 1]
    return right and all(weight.cut is not None for weight in matrices) and len(matrices) >= 8


def gathers_are_right(hybrid: HybridEngine, gather_layers: int) -> bool:
    """Check that no gather holds more layers than it should; the miniature models have two."""
    layers = [
        {w.block for w in weights if "layers." in w.block} for weights in hybrid.replica._gathers()
    ]
    return max(map(len, layers)) == min(gather_layers, 2) and sum(map(len, layers)) == 2


def steep_engine(stock: str, *, family: str, zero: int, lora: str, offload: bool):
    """Build an engine on a miniature model with weights 25 times as large as usual: at init 0.02,
    answers repeat one token.
    """
    engine = training_engine(
        f"{stock}/steep/{family}",
        load_adapted if lora else load_causal_lm,
        stock,
        zero=zero,
        dtype="fp32",
        offload=offload,
        accumulation=1,
    )
    engine.eval()
    return engine


def load_adapted(path: str, **options):
    """Load a model with adapters whose B is not zero, so that leaving them out would show."""
    model = load_causal_lm(path, **options)
    torch.manual_seed(3)
    add_lora(model, dim=4, alpha=16, only_optimize_lora=False)
    matrices = [
        p
        for name, p in model.named_parameters()
        if name in lora_parameter_names(model) and "lora_B" in name
    ]
    for matrix in matrices:
        with gathered([matrix], modify=True), torch.no_grad():
            matrix.normal_(0.0, 0.2)
    return model


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts [6, 70], padded on the left; they differ between ranks."""
    draw = torch.Generator().manual_seed(dist.rank())
    ids = torch.randint(70, 259, (len(LENGTHS), PROMPT), generator=draw)
    mask = (torch.arange(PROMPT) >= PROMPT - torch.tensor(LENGTHS)[:, None]).long()
    return here(ids * mask), here(mask)


def greedy(**other) -> GenerationConfig:
    settings = dict(
        do_sample=False,
        max_new_tokens=ANSWER,
        eos_token_id=ENDS,
        pad_token_id=0,
        num_return_sequences=1,
    )
    return GenerationConfig(**{**settings, **other})


def answers(tokens: torch.Tensor) -> list[list[int]]:
    """Return each answer up to its end."""
    ends = [
        next((i + 1 for i, t in enumerate(row) if t in ENDS), len(row)) for row in tokens.tolist()
    ]
    return [row[:end] for row, end in zip(tokens.tolist(), ends)]


def held(engine) -> dict[str, torch.Tensor]:
    """Copy this rank's part of each parameter."""
    return {
        n: getattr(p, "ds_tensor", p).detach().clone() for n, p in engine.module.named_parameters()
    }


def step(engine) -> None:
    """Take one optimizer step on the prompts."""
    ids, mask = prompts()
    engine.train()
    logits = forward_logits(engine, engine.module, input_ids=ids, attention_mask=mask)
    engine.backward(
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
    assert step_together(engine)
    engine.eval()


def sharing_is_right(hybrid: HybridEngine, *, zero: int, lora: str) -> bool:
    """Check that no weight is copied without need."""
    replica = hybrid.replica
    source = hybrid.engine.module
    own = {p.data_ptr() for p in source.parameters()}
    apart = [p for p in replica.model.parameters() if p.data_ptr() not in own]
    if zero == 3:
        return len(apart) == len(list(replica.model.parameters()))
    if lora == "merge":
        return 0 < len(apart) == len(lora_parameter_names(source)) // 2
    attached = any(isinstance(module, LowRankLinear) for module in replica.model.modules())
    return not apart and attached == (lora == "attach")
