"""Functions for the worker: shared models, int8 weights, and optimizer states moved to the host."""

import gc
from unittest import mock

import torch
from deepspeed.runtime import zero
from engine_checks import here, moved, snapshot
from peft.tuners.lora import LoraLayer
from worker import run_main

from dschat.checkpoint.save_model import save_model
from dschat.config.options import LoraOptions, ScheduleOptions, SystemOptions
from dschat.demo.tiny_models import make_tiny_model
from dschat.engine.build import build_inference_engine, build_training_engine, partitioned_loading
from dschat.engine.device import TORCH_DTYPES, on_cpu
from dschat.engine.ds_config import inference_config, training_config
from dschat.engine.offload import offload_idle_states, reload_idle_states
from dschat.engine.optim import step_together
from dschat.engine.quantized import (
    QuantizedLinear,
    dequantize,
    dequantized_state_dict,
    quantize,
    quantize_linears,
    weight_bytes,
)
from dschat.engine.shared_models import AdaptersOff
from dschat.engine.zero import full_tensors, gathered
from dschat.models.causal_lm import load_causal_lm
from dschat.models.dropout import disable_dropout
from dschat.models.folder_checks import check_finite
from dschat.models.forward import forward_logits
from dschat.models.lora import adapted_layer_names, lora_parameter_names
from dschat.models.prepare import prepare_for_training
from dschat.models.tokenizer import load_tokenizer
from dschat.runtime import dist
from dschat.trainers import rlhf_engine

LORA = LoraOptions(lora_dim=4, lora_alpha=16.0, only_optimize_lora=True)


def lora_engine(
    path: str,
    *,
    zero: int,
    dtype: str = "fp32",
    offload: bool = False,
    mixed: bool = False,
    change=None,
    rate: float = 1e-2,
    **prepared,
):
    """Build a training engine with adapters only. ZeRO-3 partitions every parameter, however small.

    Args:
        rate: the learning rate.
        change: called with the model before the engine is built, and whether it is to be quantised.
    """
    system = SystemOptions(zero_stage=zero, offload=offload, **prepared)
    ds_config = training_config(
        system,
        dtype=dtype,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        world_size=dist.world_size(),
        on_cpu=on_cpu(),
    )
    in_pieces(ds_config)
    if dtype == "fp16":
        ds_config["fp16"]["initial_scale_power"] = (
            8  # the usual 16 overflows for longer than this runs
        )
    with partitioned_loading(ds_config):
        model = load_causal_lm(
            path, dtype=TORCH_DTYPES[dtype], tokenizer=load_tokenizer(path), dropout=0.0
        )
    disable_dropout(model)
    torch.manual_seed(3)
    names = prepare_for_training(model, lora=LORA, system=system)
    if mixed:
        quantize_linears(model, adapted_layer_names(model), "int8")
    if change is not None:
        change(model)
    return build_training_engine(
        model,
        ds_config=ds_config,
        schedule=ScheduleOptions(lr_scheduler_type="constant"),
        total_steps=9,
        learning_rate=rate,
        weight_decay=0.0,
        lora_names=names,
        lora_learning_rate=rate,
    )


def in_pieces(ds_config: dict) -> None:
    """Let ZeRO-3 partition every parameter: its usual threshold keeps those of miniature models
    whole.
    """
    if ds_config["zero_optimization"]["stage"] == 3:
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def batch(micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2 * micro + dist.rank())
    ids = here(torch.randint(3, 259, (2, 10), generator=draw))
    return ids, torch.ones_like(ids)


def logits_of(engine, micro: int = 0) -> torch.Tensor:
    ids, mask = batch(micro)
    engine.eval()
    with torch.no_grad():
        return forward_logits(engine, engine.module, input_ids=ids, attention_mask=mask)


def train(engine, micro: int) -> float:
    engine.train()
    ids, mask = batch(micro)
    logits = forward_logits(engine, engine.module, input_ids=ids, attention_mask=mask)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    )
    engine.backward(loss)
    assert step_together(engine)
    return loss.item()


def shared_reference(
    stock: str, *, family: str, zero: int, dtype: str, offload: bool = False
) -> dict:
    """Compare the actor without adapters to a separate model before, between and after steps; all
    should be true.
    """
    path = f"{stock}/sft/{family}"
    actor = lora_engine(path, zero=zero, dtype=dtype, offload=offload)
    config = inference_config(
        SystemOptions(zero_stage=zero),
        dtype=dtype,
        micro_batch_size=2,
        world_size=dist.world_size(),
    )
    in_pieces(config)
    with partitioned_loading(config):
        model = load_causal_lm(
            path, dtype=TORCH_DTYPES[dtype], tokenizer=load_tokenizer(path), dropout=0.0
        )
    separate = build_inference_engine(model, ds_config=config)
    shared = AdaptersOff(actor)
    same = []
    apart = []
    kept = []
    names = {n for n, p in actor.module.named_parameters() if p.requires_grad}
    for step in range(3):
        same.append(torch.equal(logits_of(shared, step), logits_of(separate, step)))
        before = logits_of(actor, step)
        # Alternate the two: under ZeRO-3 every call then has another order of modules.
        same.append(torch.equal(logits_of(shared, step), logits_of(separate, step)))
        kept.append(torch.equal(logits_of(actor, step), before))
        apart.append(not torch.equal(before, logits_of(separate, step)))
        train(actor, step)
    return {
        "the same as a separate model": all(same),
        "the actor is as before": all(kept),
        "the actor moves away": apart == [False, True, True],
        "adapters train on": names
        == {n for n, p in actor.module.named_parameters() if p.requires_grad},
        "in pieces": (zero == 3) == all(hasattr(p, "ds_id") for p in actor.module.parameters()),
    }


def quantised_training(
    stock: str, *, family: str, zero: int, dtype: str, checkpointing: bool, offload: bool = False
) -> dict:
    """Check that int8 layers train adapters as dense layers of the same values do; all should be
    true.
    """
    path = f"{stock}/sft/{family}"
    options = dict(zero=zero, dtype=dtype, offload=offload, gradient_checkpointing=checkpointing)
    at_once: list[bool] = []

    def look(model) -> None:
        at_once.extend(
            hasattr(m.packed, "ds_id") for m in model.modules() if isinstance(m, QuantizedLinear)
        )

    quantised = lora_engine(path, mixed=True, change=look, **options)
    dense = lora_engine(path, change=round_like_int8, **options)
    layers = [m for m in quantised.module.modules() if isinstance(m, QuantizedLinear)]
    before = [piece(layer.packed).clone() for layer in layers]
    # Adam amplifies rounding. The same products in the same order round alike, except in GPT-2's
    # Conv1D.
    tolerance = 1e-4 if family == "gpt2" else 0.0
    losses = [(train(quantised, step), train(dense, step)) for step in range(4)]
    found, expected = full_tensors(quantised.module), full_tensors(dense.module)
    names = lora_parameter_names(quantised.module)
    result = {
        "all adapted layers are int8": len(layers)
        == len(adapted_layer_names(quantised.module))
        > 0,
        "no gradient reaches them": all(layer.packed.grad is None for layer in layers),
        "they stay": all(torch.equal(a, piece(layer.packed)) for a, layer in zip(before, layers)),
        "int8 in every engine": all(piece(layer.packed).dtype == torch.int8 for layer in layers),
        "in pieces": (zero == 3) == all(hasattr(layer.packed, "ds_id") for layer in layers),
        "before the engine is built": (zero == 3) == all(at_once),
        "equal losses": all(abs(a - b) <= tolerance * b for a, b in losses),
    }
    if dist.is_main():
        saved = dequantized_state_dict(quantised.module, found)
        frozen = [name for name in saved if name not in names]
        result["adapters take equal steps"] = all(
            close(found[n], expected[n], tolerance) for n in names
        )
        result["adapters have moved"] = any(
            found[n].abs().max() > 1e-3 for n in names if "lora_B" in n
        )
        result["saved as they computed"] = all(torch.equal(saved[n], expected[n]) for n in frozen)
    return result


def piece(parameter: torch.Tensor) -> torch.Tensor:
    return getattr(parameter, "ds_tensor", parameter)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool(
        (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max().clamp(min=1.0)
    )


def round_like_int8(model) -> None:
    """Give the adapted layers the values that int8 would."""
    for module in [m for m in model.modules() if isinstance(m, LoraLayer)]:
        weight = module.base_layer.weight
        with gathered([weight], modify=True), torch.no_grad():
            if weight.numel():
                flip = (lambda w: w.t()) if module.fan_in_fan_out else (lambda w: w)
                rows = flip(weight)
                weight.copy_(
                    flip(dequantize(quantize(rows, "int8"), rows.shape[1], weight.dtype, "int8"))
                )


def frozen_memory(stock: str, *, zero: int) -> dict:
    """Return the sizes of all parameters with and without int8, and what this rank holds of them.

    "left" is what it holds, immediately after quantisation, of parameters that the model no longer
    has.
    """
    path = f"{stock}/sft/llama"
    sizes = {}
    gc.disable()  # memory that only a collection frees counts during quantisation too
    for mixed in (False, True):
        earlier = {id(p) for p in parameters_alive()}

        def count(model, earlier=earlier) -> None:
            known = earlier | {id(p) for p in model.parameters()}
            gone = [piece(p) for p in parameters_alive() if id(p) not in known]
            sizes["left"] = sum(p.numel() * p.element_size() for p in gone)

        engine = lora_engine(path, zero=zero, dtype="bf16", mixed=mixed, change=count)
        layers = [m.base_layer for m in engine.module.modules() if isinstance(m, LoraLayer)]
        frozen = [layer.packed if mixed else layer.weight for layer in layers]
        sizes[f"held {mixed}"] = sum(piece(p).numel() * p.element_size() for p in frozen)
        sizes[f"whole {mixed}"] = weight_bytes(engine.module)
    gc.enable()
    return sizes


def parameters_alive() -> list[torch.nn.Parameter]:
    return [found for found in gc.get_objects() if isinstance(found, torch.nn.Parameter)]


def idle_states(stock: str, *, zero: int, dtype: str, offload: bool = False) -> dict:
    """Compare steps with states moved to the host between them to steps without; all should be
    true.
    """
    path = f"{stock}/sft/llama"
    travelled, stayed = (
        lora_engine(path, zero=zero, dtype=dtype, offload=offload) for _ in range(2)
    )
    went, shared, same = [], [], []
    pins = (True, False, True)
    for step, pin in enumerate(pins):
        masters = master_addresses(travelled)
        weights = [piece(p).data_ptr() for p in travelled.module.parameters()]
        offload_idle_states(travelled, pin_memory=pin)
        went.append(all(a != b for a, b in zip(masters, master_addresses(travelled))))
        shared.append(weights == [piece(p).data_ptr() for p in travelled.module.parameters()])
        same.append(torch.equal(logits_of(travelled, step), logits_of(stayed, step)))
        reload_idle_states(travelled)
        train(travelled, step)
        train(stayed, step)
    # On a CPU without page-locking DeepSpeed moves nothing; stage 3's states are moved here.
    expected = [not offload and (pin or zero == 3) for pin in pins]
    return {
        "masters went, and none that --offload keeps on the host": went == expected or zero == 0,
        "weights stayed where they are": all(shared),
        "generation reads the same": all(same),
        "the same to the bit": moved([snapshot(travelled)], [snapshot(stayed)]) == [False],
    }


def run_with_travelling_states(*, argv: str, out: str) -> None:
    """Run step 3 as on a GPU, where --offload_idle_states has an effect."""
    with mock.patch.object(rlhf_engine, "on_cpu", lambda: False):
        run_main(3, argv=argv, out=out)


def master_addresses(engine) -> list[int]:
    """Return the bytes of the fp32 master weights.

    On a CPU, moving to the host does not copy Adam's moments, but it copies these.
    """
    if engine.zero_optimization_stage() == 0:
        return []
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return [t.data_ptr() for name in names for t in getattr(engine.optimizer, name, ())]


def idle_memory(stock: str, *, zero: int) -> dict:
    """Return the GPU bytes of an engine that has stepped: with its idle states, without, and with
    again.
    """
    engine = lora_engine(f"{stock}/sft/llama", zero=zero, dtype="bf16")
    train(engine, 0)
    sizes = {"there": requested_bytes()}
    offload_idle_states(engine)
    sizes["away"] = requested_bytes()
    reload_idle_states(engine)
    sizes["back"] = requested_bytes()
    sizes["trained"] = sum(
        getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad
    )
    return sizes


def finite_in_pieces(stock: str) -> dict:
    """Check that partitioned weights with uneven sizes are finite, whatever their padding holds;
    all should be true.
    """
    config = inference_config(
        SystemOptions(zero_stage=3), dtype="fp32", micro_batch_size=1, world_size=dist.world_size()
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that is never set is NaN
    with zero.Init(config_dict_or_path=config):
        model = torch.nn.Linear(3, 1)
    torch.use_deterministic_algorithms(False)
    found = {"in pieces": model.weight.ds_tensor.numel() == 2}
    if dist.rank() == 1:
        found["there is NaN in the padding"] = bool(model.weight.ds_tensor.isnan().any())
    check_finite(model, path="somewhere", flag="--model")
    if dist.rank() == 1:
        model.weight.ds_tensor.data[0] = float("inf")
    try:
        check_finite(model, path="somewhere", flag="--model")
    except ValueError as error:
        found["all name the one that has it"] = str(error).startswith(
            "--model 'somewhere': weight holds values that are no finite"
        )
    return {"all name the one that has it": False, **found}


def adapter_in_pieces(stock: str, *, out: str) -> dict:
    """Compare an adapter folder loaded under ZeRO-3 to one process without ZeRO; all should be
    true.
    """
    path = f"{stock}/sft/gpt2"
    engine = lora_engine(path, zero=2)
    for step in range(2):
        train(engine, step)
    save_model(engine.module, load_tokenizer(path), out)
    adapter = f"{out}/adapter"
    plain = load_causal_lm(adapter, dtype=torch.float32)
    again = lora_engine(adapter, zero=3)
    found = full_tensors(again.module)
    expected = plain.state_dict()
    result = {"in pieces": all(hasattr(p, "ds_id") for p in again.module.parameters())}
    if dist.is_main():
        start = load_causal_lm(path, dtype=torch.float32).state_dict()
        names = {name.replace(".base_layer.", "."): name for name in found if ".lora_" not in name}
        result["merged alike"] = all(
            torch.equal(found[own], expected[name]) for name, own in names.items()
        )
        result["merged at all"] = any(
            not torch.equal(start[name], expected[name]) for name in names
        )
    return result


def int8_memory(stock: str, *, zero: int, out: str) -> list[dict]:
    """Return, without and with int8, the GPU bytes of an engine, those of its adapted weights, and
    losses.
    """
    path = make_tiny_model(out, family="llama", hidden=1024, heads=8, kv_heads=8, layers=4)
    found = []
    for mixed in (False, True):
        gc.collect()  # reference cycles of earlier cases; below, those of loading
        before = requested_bytes()
        engine = lora_engine(str(path), zero=zero, dtype="bf16", mixed=mixed, rate=2e-4)
        layers = [m.base_layer for m in engine.module.modules() if isinstance(m, LoraLayer)]
        gc.collect()
        held = requested_bytes() - before
        frozen = sum(2 * layer.in_features * layer.out_features for layer in layers)
        found.append(
            {"allocated": held, "frozen": frozen, "losses": [train(engine, 0) for _ in range(6)]}
        )
    return found


def requested_bytes() -> int:
    """Return the bytes of all tensors on the GPU.

    Allocated bytes are more: a reused block may be up to 1 MiB larger than requested.
    """
    return torch.cuda.memory_stats().get("requested_bytes.all.current", 0)
