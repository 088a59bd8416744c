"""Functions for the worker: adapters of experts, under ZeRO and in the Hybrid Engine."""

import torch
from engine_checks import training_engine
from hybrid_checks import answers, greedy, prompts, step

from dschat.engine.hybrid_engine import HybridEngine, PlainGenerator
from dschat.engine.zero import full_tensors, gathered
from dschat.models.causal_lm import load_causal_lm
from dschat.models.lora import add_lora, expert_adapters, lora_parameter_names, merged_state_dict
from dschat.models.prepare import enable_checkpointing
from dschat.models.tokenizer import load_tokenizer
from dschat.runtime import dist
from tests.tiny_families import tiny_family_model


def expert_adapters_train_alike(stock: str, *, family: str, out: str) -> dict:
    """Compare updates under ZeRO-2 and 3 with those without ZeRO; all entries should be true."""
    path = write_mixture(stock, family, f"{out}/{family}")
    expected, _ = trained(path, stock, zero=0, checkpointing=False)
    result = {}
    for zero, checkpointing in ((2, False), (3, True)):
        found, checks = trained(path, stock, zero=zero, checkpointing=checkpointing)
        name = f"ZeRO-{zero}{', checkpointing' if checkpointing else ''}"
        result |= {f"{name}: {check}": passed for check, passed in checks.items()}
        if dist.is_main():
            result[f"{name}: same weights"] = all(
                torch.allclose(found[key], tensor, atol=1e-4) for key, tensor in expected.items()
            )
    return result


def write_mixture(stock: str, family: str, path: str) -> str:
    """Write a miniature mixture of experts, and return its folder."""
    if dist.is_main():
        tiny_family_model(family).save_pretrained(path)
        load_tokenizer(f"{stock}/sft/llama").save_pretrained(path)
    dist.barrier()
    return path


def trained(path: str, stock: str, *, zero: int, checkpointing: bool) -> tuple[dict, dict]:
    """Return the merged weights after two updates, and checks of the engine."""

    def load(path: str, **options):
        model = load_causal_lm(path, **options)
        torch.manual_seed(3)
        add_lora(model, dim=2, alpha=8, only_optimize_lora=True)
        if checkpointing:
            enable_checkpointing(model)
        for name in sorted(lora_parameter_names(model)):
            if "lora_B" in name:
                with gathered([model.get_parameter(name)], modify=True), torch.no_grad():
                    model.get_parameter(name).normal_(0.0, 0.1)
        return model

    # Partition the small parameters, too, which would stay whole.
    engine = training_engine(
        path,
        load,
        stock,
        zero=zero,
        dtype="fp32",
        offload=False,
        accumulation=1,
        persistent=0,
    )
    model = engine.module
    before = full_tensors(model)
    generators = HybridEngine(engine, compiled=False), PlainGenerator(engine)
    # Before the first forward pass, in which DeepSpeed may register weights of other modules.
    first = [generator.decode(*prompts(), greedy()).tokens for generator in generators]
    step(engine)
    step(engine)
    second = [generator.decode(*prompts(), greedy()).tokens for generator in generators]
    after = full_tensors(model)
    checks = {
        "experts have adapters": len(expert_adapters(model)) > 0,
        "the Hybrid Engine answers as generate": answers(first[0]) == answers(first[1]),
        "also after updates": answers(second[0]) == answers(second[1]),
        "updates change the answers": answers(first[0]) != answers(second[0]),
    }
    if dist.is_main():
        checks["every adapter moves, and nothing else"] = all(
            torch.equal(before[name], after[name]) == (".lora_" not in name) for name in before
        )
    return merged_state_dict(model, after) if dist.is_main() else {}, checks
