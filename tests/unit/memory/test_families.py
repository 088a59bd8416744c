"""The memory plan on miniatures of transformers' families, against models that are really built."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from dschat.config.options import LoraOptions, SystemOptions
from dschat.generation.cache_size import LayerCache, class_cache, count_cache
from dschat.memory.activations import kept_bytes
from dschat.memory.model_size import model_size
from dschat.memory.plan import StepPlan
from dschat.memory.report import sureness_lines
from dschat.models.families import shape_config
from dschat.models.structure import cache_argument
from tests.tiny_families import COMMON, RARE, tiny_config, tiny_family_model

FAMILIES = [*COMMON, *(pytest.param(family, marks=pytest.mark.slow) for family in RARE)]
TOKENS = 6  # less than the miniatures' sliding windows
# Experts that read values even on the meta device, or masks that do.
ONLY_BOUNDED = ("biogpt", "jetmoe", "longcat_flash")
# Its recurrent layers keep their states themselves.
STATES_IN_MODULES = ("recurrent_gemma",)


def cached_elements(model) -> int:
    """Return the elements of all tensors in the cache after a real prefill of one text."""
    cache = DynamicCache(config=model.config)
    ids = torch.arange(3, 3 + TOKENS)[None]
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
    found = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else [value]
            found += sum(t.numel() for t in values if isinstance(t, torch.Tensor) and t.dim() > 1)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_parameters_and_cache_of_every_family(family):
    model = tiny_family_model(family)
    before = model.config.to_dict()
    size = model_size(model.config, system=SystemOptions())
    assert model.config.to_dict() == before
    assert size.trained == size.parameters == sum(p.numel() for p in model.parameters())
    planned = size.cache.elements(rows=1, positions=TOKENS)
    assert size.cache.counted == (family not in ONLY_BOUNDED)
    if size.cache.counted and family not in STATES_IN_MODULES:
        assert planned == cached_elements(model)
    else:
        assert planned >= cached_elements(model)


def test_a_window_bounds_the_tokens_and_states_do_not_grow():
    assert LayerCache(10, fixed=7).elements(100) == 1007
    assert LayerCache(10, fixed=7, window=8).elements(100) == 87
    assert LayerCache(10, fixed=7, window=8).elements(5) == 57
    size = class_cache(LlamaForCausalLM, shape_config("llama-2-7b"))
    # 2 x 32 layers x 16 rows x 512 tokens x 32 heads x 128.
    assert size.elements(rows=16, positions=512) == 2 * 2**30
    # 8 of Llama-2-70B's 64 heads hold keys and values.
    large = model_size(shape_config("llama-2-70b")).cache
    assert large.elements(rows=1, positions=1) == 2 * 80 * 8 * 128


def test_multi_query_attention_caches_one_head():
    config = tiny_config("falcon")
    one_head = model_size(config).cache.elements(rows=1, positions=1)
    assert one_head == 2 * config.num_hidden_layers * config.hidden_size // 4


def test_copies_of_adapted_experts_are_counted():
    config, lora = tiny_config("qwen3_moe"), LoraOptions(lora_dim=2)
    adapted = model_size(config, lora=lora, system=SystemOptions())
    without = model_size(config, lora=replace(lora, lora_experts=False), system=SystemOptions())
    a_layer = 4 * (64 * 64 + 64 * 32)
    assert adapted.adapted_experts == adapted.merged - without.merged == 2 * a_layer
    assert without.adapted_experts == 0 and adapted.lora_width == without.lora_width == 4 * 2
    for checkpointing, copies in ((False, 3), (True, 2)):
        options = dict(tokens=10, width=2, checkpointing=checkpointing)
        kept = [kept_bytes(size, **options) for size in (adapted, without)]
        assert kept[0] - kept[1] == copies * 2 * a_layer


def test_counting_leaves_the_model_as_it_was():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, pad_token_id=5))
    model.train()
    count_cache(model)
    assert model.training and model.config.pad_token_id == 5
    assert model.config._experts_implementation != "batched_mm"


def test_what_is_not_certain_is_said():
    def lines(family: str) -> list[str]:
        size = model_size(tiny_config(family))
        return sureness_lines(StepPlan({}, {"actor": size}, {}, {}))

    assert lines("llama") == []
    (line,) = lines("bamba")
    assert line.startswith("actor (bamba): parameters are exact; activations") and "KV" not in line
    (line,) = lines("jetmoe")
    assert "KV cache is an upper bound" in line
