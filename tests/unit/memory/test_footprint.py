"""The memory planner against numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.algorithms import logprobs
from dschat.config.options import LoraOptions, SystemOptions
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig
from dschat.generation.cache_size import CacheSize, LayerCache
from dschat.memory import activations
from dschat.memory.advice import GIB, OVERHEAD
from dschat.memory.footprint import inference_footprint, training_footprint
from dschat.memory.model_size import ModelSize, model_size, named_size
from dschat.memory.phases import KINDS
from dschat.memory.plan import plan_step
from dschat.memory.report import plan_text
from dschat.models.families import FAMILIES, shape_config
from dschat.models.prepare import prepare_for_training
from dschat.models.reward_model import RewardModel

# 1,000 parameters, of which 600 + 100 train; the numbers below follow from these alone.
SIZE = ModelSize(
    family="llama",
    parameters=1000,
    groups=(600, 100),
    largest=300,
    largest_trained=200,
    layers=4,
    hidden=8,
    heads=2,
    cache=CacheSize(((LayerCache(16), 4),)),
    intermediate=16,
    vocab=50,
    trained_layers=4,
)
BUCKET = 100_000_000


def training(
    stage: int,
    *,
    offload: bool = False,
    pin: bool = False,
    dtype: str = "bf16",
    world_size: int = 4,
    size=SIZE,
    **more,
):
    system = SystemOptions(zero_stage=stage, offload=offload, pin_memory=pin)
    return training_footprint(size, system, dtype=dtype, world_size=world_size, **more)


def test_plain_fp32_holds_weights_gradients_and_two_moments():
    found = training(0, dtype="fp32")
    assert (found.weights, found.master, found.adam, found.gradients) == (4000, 0, 5600, 2800)
    assert found.resident == 9600 and found.step == found.early == found.host == 0


@pytest.mark.parametrize("stage", [0, 1])
def test_stage_1_divides_the_optimizer_states(stage):
    found = training(stage)
    # Whole weights and gradients; a quarter of 700 x (4 + 8) bytes.
    assert (found.weights, found.master, found.adam, found.gradients) == (2000, 700, 1400, 1400)
    assert found.early == 2 * BUCKET
    assert found.reduce == 2 * BUCKET + 350  # this rank's part of the gradients, besides all
    # The largest group's quarter, 150, flat in bf16 and in fp32; other ranks' gradients are freed.
    assert found.step == 6 * 150 - (1400 - 350)
    assert found.build == 2 * 600


def test_stage_2_divides_the_gradients_too():
    found = training(2)
    assert (found.weights, found.master, found.adam, found.gradients) == (2000, 700, 1400, 350)
    assert found.early == 2 * BUCKET + 350 and found.step == 6 * 150


def test_stage_3_divides_the_weights_too():
    found = training(3)
    assert (found.weights, found.master, found.adam) == (500, 700, 1400)
    # A bucket of DeepSpeed's default size, this rank's part of the gradients, and the whole weights
    # in use (here all).
    assert found.buffers == 2 * 500_000_000 + 350 + 2000
    assert found.step == 6 * 175
    # A single rank uses its gradients in place.
    assert training(3, world_size=1).buffers == 2 * 500_000_000 + 1400


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_offload_leaves_weights_on_the_gpu(stage):
    found = training(stage, offload=True)
    assert (found.weights, found.master, found.adam, found.step) == (2000, 0, 0, 0)
    assert found.buffers == 2 * 200  # one gradient on its way
    assert found.gradients == (0 if stage == 2 else 1400)
    # fp32 weights, gradients, two moments, and bf16 weights of a quarter of 700.
    assert found.host == 18 * 175


def test_offload_of_stage_3_leaves_only_weights_in_use():
    found = training(3, offload=True)
    assert (found.weights, found.buffers) == (0, 2 * 500_000_000 + 2000)
    # The trained weights are always page-locked: 2 x 150 and 2 x 25 bytes, rounded up to powers of
    # two.
    assert found.host == 500 + (512 - 300) + (64 - 50) + 18 * 175
    # The GPU has a copy even with a single rank.
    assert training(3, offload=True, world_size=1).buffers == 2 * 500_000_000 + 2000


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_page_locked_buffers_take_powers_of_two(stage):
    # Of groups of 150 and 25: fp32 weights and gradients, bf16 weights; the moments are not
    # page-locked.
    assert training(stage, offload=True, pin=True).host == 2 * (1024 + 128) + (512 + 64) + 8 * 175
    # Four times as many parameters in the same two groups, of 512 and 128: powers of two already.
    exact = replace(SIZE, groups=(512, 128))
    assert training(stage, offload=True, pin=True, size=exact, world_size=1).host == 18 * 640
    several = dict(offload=True, world_size=1, accumulation=2, size=replace(exact, rounding=1.5))
    more = training(stage, pin=True, **several).host - training(stage, **several).host
    assert more == pytest.approx(0.5 * 2 * 640)  # gradients that accumulate have a buffer each


def test_page_locked_buffers_of_stage_3():
    # Frozen weights have a buffer each; trained ones, their gradients and the steps' are flat.
    pinned = training(3, offload=True, pin=True, size=replace(SIZE, rounding=1.5))
    assert pinned.host_weights == 1.5 * (500 - 350) + 512 + 64
    assert pinned.host - pinned.host_weights == 12 * 175 + 512 + (1024 + 128)
    # Steps of 10^9 elements: 4 x 10^9 bytes round up to 2^32. The remainder rounds up separately.
    large = replace(SIZE, parameters=2_500_000_000, groups=(2_500_000_000,))
    found = training(3, offload=True, pin=True, size=large, world_size=1)
    assert found.host - found.host_weights == 12 * 2_500_000_000 + 2**33 + 2 * 2**32 + 2**31


def test_accumulation_and_averages():
    assert (
        training(1, accumulation=2).waiting == 2 * BUCKET + 1400
        and training(1, accumulation=2).early == 0
    )
    assert training(2, accumulation=2).waiting == 350 and training(3, accumulation=2).waiting == 0
    assert (
        training(2, average=True).average == 4 * 175
        and training(2, average=True, offload=True).host == 22 * 175
    )


def test_models_that_only_evaluate():
    def footprint(stage, offload=False, world_size=4, size=SIZE, **more):
        return inference_footprint(
            size, stage=stage, offload=offload, width=2, world_size=world_size, **more
        )

    assert footprint(0).resident == footprint(2).resident == 2000
    assert (footprint(3).weights, footprint(3).buffers, footprint(3).host) == (500, 2000, 0)
    assert (footprint(3, offload=True).weights, footprint(3, offload=True).host) == (0, 500)
    uneven = replace(SIZE, rounding=1.5)
    assert (
        footprint(3, offload=True, size=uneven).host
        == footprint(3, offload=True, size=uneven).host_weights
        == 750
    )
    assert footprint(3, offload=True, size=uneven, pin_memory=False).host == 500


def test_activations_of_a_llama_layer():
    # A token: two norms of 4 x 8 (fp32) + 2 x 8 (out) + 2 x 8 (normalized), four of 2 x 8 in the
    # attention, four of 2 x 16 in the feed-forward part, and 4 bytes of log-sum-exp for each of two
    # heads.
    assert activations.layer_bytes(SIZE, width=2) == 2 * (32 + 16 + 16) + 4 * 16 + 4 * 32 + 8
    ends = (4 + 6) * 8
    assert activations.kept_bytes(SIZE, tokens=3, width=2, checkpointing=False) == 3 * (
        4 * 328 + ends
    )
    assert activations.kept_bytes(SIZE, tokens=3, width=2, checkpointing=True) == 3 * (
        4 * 16 + ends
    )


def test_activations_of_an_opt_layer():
    opt = ModelSize(**{**vars(SIZE), "family": "opt", "intermediate": 32})
    assert activations.layer_bytes(opt, width=2) == 2 * (8 * 8 + 32) + 8
    dropping = ModelSize(**{**vars(opt), "dropout": 0.1})
    assert activations.layer_bytes(dropping, width=2) == 2 * (8 * 8 + 32) + 8 + 2 * 8


def test_logits_are_chunked_as_in_the_loss():
    assert activations.CHUNK_ELEMENTS == logprobs.CHUNK_ELEMENTS
    few = 1000
    many = 10 * activations.CHUNK_ELEMENTS
    assert activations.loss_bytes(few, width=2, sliced=False, backward=True) == 2000 + 25 * 1000
    chunk = activations.CHUNK_ELEMENTS
    assert (
        activations.loss_bytes(many, width=2, sliced=True, backward=True)
        == 4 * many + 17 * chunk + 4 * many
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize(
    "lora, freeze",
    [
        (LoraOptions(), 0),
        (LoraOptions(), 3),
        (LoraOptions(lora_dim=4), 1),
        (LoraOptions(lora_dim=4, only_optimize_lora=True), 0),
        (LoraOptions(lora_dim=4, target_modules=[r".*\.[02]\..*(mlp|fc|dense).*"]), 0),
    ],
)
def test_counting_a_few_layers_gives_the_size_of_all(family, reward, lora, freeze):
    """Compare with the model with all of its layers, prepared as in a step."""
    config = shape_config(f"tiny-{family}")
    config.num_hidden_layers = 8
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * 8
    system = SystemOptions(freeze_layers=freeze)
    found = model_size(config, reward=reward, lora=lora, system=system)
    with torch.device("meta"):
        if reward:
            config.num_labels = 1
            model = RewardModel(AutoModelForSequenceClassification.from_config(config))
        else:
            model = AutoModelForCausalLM.from_config(config)
    adapters = prepare_for_training(model, lora=lora, system=system)
    parameters = dict(model.named_parameters())
    assert found.parameters == sum(p.numel() for p in parameters.values())
    assert found.trained == sum(p.numel() for p in parameters.values() if p.requires_grad)
    assert found.adapters == sum(p.numel() for name, p in parameters.items() if name in adapters)
    assert found.merged == sum(
        p.numel() for name, p in parameters.items() if name.endswith("base_layer.weight")
    )
    assert found.largest == max(p.numel() for p in parameters.values())
    assert found.trained_layers == 8 - freeze and found.layers == 8
    assert found.intermediate == (128 if family in ("llama", "qwen2", "mistral") else 256)
    assert found.vocab == (0 if reward else 264)


def test_llama_2_70b_groups_its_keys():
    size = named_size("meta-llama/Llama-2-70b-hf", flag="--model")
    assert (size.parameters, size.trained, size.layers) == (
        68_976_648_192,
        0,
        80,
    )


STEP3 = (
    "--actor_model_name_or_path llama-2-7b --critic_model_name_or_path llama-2-7b "
    "--max_prompt_seq_len 256"
)


def ppo(flags: str, world_size: int = 1):
    return plan_step(
        parse_config(PPOConfig, f"{STEP3} {flags}".split()), world_size=world_size, dtype="bf16"
    )


def test_scoring_holds_at_most_the_tokens_that_are_given():
    def scored(flags: str) -> float:
        more = "--max_answer_seq_len 256 --per_device_training_batch_size 2"
        return ppo(f"{more} {flags}").parts["score"]["activations"]

    given = scored("--per_device_generation_batch_size 64 --scoring_tokens_per_batch 4096")
    assert given < scored("--per_device_generation_batch_size 64")
    # As eight rows of 512 tokens, or more: all tokens of a part may have logits.
    assert given >= scored("--per_device_generation_batch_size 8")
    few = "--per_device_generation_batch_size 2"
    assert scored(few) < scored(f"{few} --scoring_tokens_per_batch 4096") < given


def test_an_update_of_step_3_holds_at_most_the_tokens_that_are_given():
    def trained(flags: str, name: str = "actor backward") -> dict:
        more = "--max_answer_seq_len 256 --per_device_generation_batch_size 64"
        return ppo(f"{more} {flags}").parts[name]

    tokens = "--training_tokens_per_batch 4096"
    given = trained(f"--per_device_training_batch_size 32 {tokens}")
    assert given["activations"] < trained("--per_device_training_batch_size 32")["activations"]
    # As eight rows of 512 tokens, or more: all tokens of a micro-batch may have logits.
    eight = trained("--per_device_training_batch_size 8 --gradient_accumulation_steps 2")
    assert given["activations"] >= eight["activations"]
    # The gradients of several micro-batches are kept.
    assert given["gradients"] == eight["gradients"]
    few = trained(f"--per_device_training_batch_size 2 {tokens}")
    assert few["activations"] < given["activations"]


def test_step_3_has_four_models_or_three_without_a_critic():
    plan = ppo("")
    assert set(plan.models) == {"actor", "reference", "reward", "critic"}
    assert plan.models["reference"].weights == 2 * 6_738_415_616
    # The score head replaces the output head: 32000 x 4096 less, 4096 more.
    assert plan.models["reward"].weights == 2 * (6_738_415_616 - 32000 * 4096 + 4096)
    rloo = ppo("--advantage_estimator rloo --num_samples_per_prompt 2")
    assert set(rloo.models) == {"actor", "reference", "reward"} and not any(
        "critic" in phase for phase in rloo.phases
    )


def test_the_replica_shares_merges_or_gathers():
    rows = (
        "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 --eval_prompts 4"
    )
    hybrid = f"--enable_hybrid_engine {rows}"
    cache = 2 * 2 * 32 * 4096 * 4 * 512  # bf16, keys and values, layers, width, rows, positions
    assert ppo(hybrid).resident == {"KV cache": cache, "replica": 0}
    adapted = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    lora = f"{hybrid} --actor_lora_dim 8 --only_optimize_lora"
    assert ppo(lora).resident["replica"] == 2 * adapted
    assert ppo(f"{lora} --hybrid_lora attach").resident["replica"] == 0
    gathered = ppo(f"{lora} --actor_zero_stage 3", world_size=8)
    assert gathered.resident["replica"] == 2 * 6_738_415_616
    freed = ppo(f"{hybrid} --actor_zero_stage 3 --release_inference_cache")
    assert set(freed.resident) == {"KV cache (while generating)", "replica (while generating)"}
    kept = ppo(f"{hybrid} --actor_zero_stage 3")
    assert kept.phases["actor step"] - freed.phases["actor step"] == 2 * 6_738_415_616 + cache


def test_a_tensor_parallel_replica_is_divided_but_for_embeddings_norms_and_head():
    flags = "--enable_hybrid_engine --actor_zero_stage 3 --per_device_generation_batch_size 4"
    flags += " --eval_prompts 4 --per_device_training_batch_size 4"
    whole, split = ppo(flags, world_size=8), ppo(f"{flags} --inference_tp_size 4", world_size=8)
    in_layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    outside = 2 * 32000 * 4096 + 65 * 4096
    assert split.sizes["actor"].split == in_layers and in_layers + outside == 6_738_415_616
    assert split.resident["replica"] == 2 * (in_layers / 4 + outside)
    # Four times the rows, a quarter of the heads.
    assert split.resident["KV cache"] == whole.resident["KV cache"] == 2 * 2 * 32 * 4096 * 4 * 512
    # Eight of 32 layers are whole at once while slices are taken, more than the prompts need.
    prefill = 4 * 256 * (2 * 3 * (4096 + 11008) + 4 * 4096)
    freed = 2 * in_layers * 3 / 4
    assert (
        whole.phases["generate"] - split.phases["generate"] == freed + prefill - 2 * in_layers / 4
    )
    # 64 prompts of 256 tokens on each of four ranks: hidden states are whole, the feed-forward part
    # is a quarter.
    many = flags.replace("generation_batch_size 4", "generation_batch_size 64")
    whole, split = ppo(many, world_size=8), ppo(f"{many} --inference_tp_size 4", world_size=8)
    gathered = 4 * 64 * 256 * (2 * 3 * (4096 + 11008 / 4) + 4 * 4096)
    assert whole.phases["generate"] - split.phases["generate"] == freed + 16 * prefill - gathered
    assert (
        ppo(flags.replace("--enable_hybrid_engine", "--inference_tp_size 4")).resident["replica"]
        == 0
    )


def test_split_biases_count_where_outputs_are_split():
    # q, k, v and fc1 with their biases, out_proj and fc2 without.
    size = named_size("opt-1.3b", flag="--model")
    assert size.split == 24 * (4 * 2048 * 2048 + 3 * 2048 + 2 * 2048 * 8192 + 8192)
    assert named_size("tiny-gpt2", flag="--model").split == 0


ADAPTERS = "--actor_lora_dim 8 --critic_lora_dim 8 --only_optimize_lora"


def test_shared_reference_and_reward_take_no_memory():
    assert set(ppo(ADAPTERS).models) == {"actor", "critic"}
    assert set(ppo(f"{ADAPTERS} --no_share_reference").models) == {"actor", "reference", "critic"}
    assert set(ppo(f"{ADAPTERS} --no_share_reward").models) == {"actor", "reward", "critic"}
    other = ppo(f"{ADAPTERS} --reward_model_name_or_path opt-350m")
    assert set(other.models) == {"actor", "reward", "critic"}
    apart = ppo(f"{ADAPTERS} --no_share_reference --no_share_reward")
    both = 2 * (2 * 6_738_415_616 - 32000 * 4096 + 4096)
    assert apart.phases["actor step"] - ppo(ADAPTERS).phases["actor step"] == both


def test_idle_states_are_on_the_host_except_in_updates():
    # fp32 weights and two moments of 700 trained parameters on 4 ranks; under ZeRO-3 also the
    # gradients' buffer.
    assert (training(2).idle, training(3).idle, training(0, dtype="fp32").idle) == (
        12 * 175,
        14 * 175,
        8 * 700,
    )
    assert (training(2).idle_host, training(3).idle_host, training(0, dtype="fp32").idle_host) == (
        2100,
        2450,
        5600,
    )
    pinned = [training(stage, pin=True).idle_host for stage in (2, 3)]
    assert pinned == [3 * (1024 + 128), 3 * (1024 + 128) + 512]
    assert training(2, offload=True).idle == training(3, offload=True).idle == 0
    flags = "--actor_zero_stage 2 --critic_zero_stage 2"
    there, away = (
        ppo(flags + more, world_size=4) for more in ("", " --offload_idle_states --no_pin_memory")
    )
    trained = 2 * 6_738_415_616 - 32000 * 4096 + 4096  # actor and critic
    for phase in ("generate", "score", "evaluate"):
        assert there.phases[phase] - away.phases[phase] == 12 * trained / 4
    assert there.phases["actor step"] == away.phases["actor step"]
    assert sum(model.host for model in away.models.values()) == 12 * trained / 4


def test_int8_weights_take_a_byte_and_their_scales():
    flags = f"{ADAPTERS} --enable_mixed_precision_lora"
    plan, dense = ppo(f"{flags} --no_share_reference"), ppo(f"{ADAPTERS} --no_share_reference")
    adapted = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    saved = 2 * adapted - (adapted + 4 * adapted / 128)  # groups of 128 divide 4096 and 11008
    for role in ("actor", "reference", "critic"):
        assert dense.models[role].weights - plan.models[role].weights == saved, role
        # One matrix is dense while it is multiplied.
        assert plan.models[role].buffers - dense.models[role].buffers == 2 * 4096 * 11008
    # Reward models are quantized, too: the same sizes without the vocabulary's matrix.
    rewards = [ppo(f"{more} --no_share_reward").models["reward"] for more in (flags, ADAPTERS)]
    assert rewards[1].weights == dense.models["reference"].weights - 2 * (32000 * 4096 - 4096)
    assert rewards[1].weights - rewards[0].weights == saved
    parts = ppo(f"{flags} --actor_zero_stage 3", world_size=8)
    held = 2 * parts.sizes["actor"].parameters - saved
    assert parts.models["actor"].weights == held / 8 and parts.models["actor"].build == saved / 8
    # Merged copies are dense; attached adapters read the packed weights.
    hybrid = f"{flags} --enable_hybrid_engine"
    assert ppo(hybrid).resident["replica"] == 2 * adapted
    assert ppo(f"{hybrid} --hybrid_lora attach").resident["replica"] == 0


def test_nf4_weights_take_half_a_byte_and_their_scales():
    plan = ppo(f"{ADAPTERS} --quantize_frozen nf4 --no_share_reference")
    dense = ppo(f"{ADAPTERS} --no_share_reference")
    adapted = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    saved = 2 * adapted - (adapted / 2 + 2 * adapted / 64)  # groups of 64, with bf16 scales
    for role in ("actor", "reference", "critic"):
        assert dense.models[role].weights - plan.models[role].weights == saved, role


def test_a_pair_counts_as_two_texts_and_the_table_shows_what_is_needed():
    config = parse_config(
        RewardConfig, "--model_name_or_path opt-350m --per_device_train_batch_size 4".split()
    )
    plan = plan_step(config, world_size=1, dtype="bf16")
    size, model = plan.sizes["model"], plan.models["model"]
    kept = activations.kept_bytes(size, tokens=4096, width=2, checkpointing=False)
    working = activations.working_bytes(size, tokens=4096, width=2, checkpointing=False)
    assert plan.phases["backward"] == model.resident + kept + model.early + working
    text = plan_text(plan, processes=2, gpu_bytes=4 * GIB, all_host_bytes=GIB)
    assert (
        f"needs {(plan.peak[1] + OVERHEAD) / GIB:.1f} GiB on a GPU of 4.0 GiB: does not fit" in text
    )
    assert "1.2 GiB of host memory for 2 process(es) of 1.0 GiB: does not fit" in text


# Rows of pairs are twice as long.
@pytest.mark.parametrize("config_class, length", [(SFTConfig, 512), (RewardConfig, 1024)])
def test_packed_rows_add_their_masks(config_class, length):
    def backward(more: str) -> float:
        flags = "--model_name_or_path opt-1.3b --per_device_train_batch_size 4 --max_seq_len 512"
        flags += " --only_optimize_lora --lora_dim 8"
        config = parse_config(config_class, f"{flags} {more}".split())
        parts = plan_step(config, world_size=1, dtype="bf16").parts["backward"]
        return parts["activations"]

    mask = 4 * length**2
    added = backward("--packing") - backward("")
    assert added == pytest.approx(mask * (1 + 24 * 2))


@pytest.mark.parametrize("config_class, rows", [(SFTConfig, 8), (RewardConfig, 4)])
def test_a_batch_has_at_most_the_tokens_that_are_given(config_class, rows):
    def activations(more: str) -> float:
        flags = "--model_name_or_path opt-1.3b --only_optimize_lora --lora_dim 8"
        config = parse_config(config_class, f"{flags} {more}".split())
        return plan_step(config, world_size=1, dtype="bf16").parts["backward"]["activations"]

    given = activations("--per_device_train_batch_size 32 --tokens_per_batch 4096")
    assert given == activations(f"--per_device_train_batch_size {rows}")
    # An update with fewer tokens is one micro-batch.
    small = "--per_device_train_batch_size 1 --gradient_accumulation_steps 2"
    assert activations(f"{small} --tokens_per_batch 4096") == activations(
        "--per_device_train_batch_size 2"
    )


def test_counting_draws_no_random_numbers():
    from dschat.memory import model_size as sizes

    sizes._counted.cache_clear()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sizes._counted(
        "tiny-llama", "--model", False, False, LoraOptions(lora_dim=4), SystemOptions(), "", "none"
    )
    assert torch.equal(torch.rand(3), expected)


def test_each_phase_is_divided_into_kinds_of_tensors():
    flags = "--model_name_or_path llama-2-7b --zero_stage 2 --gradient_checkpointing"
    flags += " --per_device_train_batch_size 4 --per_device_eval_batch_size 2"
    config = parse_config(SFTConfig, flags.split())
    plan = plan_step(config, world_size=8, dtype="bf16")
    n = 6_738_415_616
    matrices = n - 65 * 4096  # the largest group of the optimizer; the norms' weights are the other
    lying = {"weights": 2 * n, "optimizer": 12 * n / 8}
    tokens, logits = 4 * 512, 4 * 512 * 32000  # fewer logits than a chunk of the loss
    kept = tokens * (32 * 2 * 4096 + 10 * 4096)  # a layer's input of each layer; the ends
    loss = (2 + 25) * logits
    # One recomputed layer (two norms, attention, feed-forward part, log-sum-exps) and gradients.
    again = 2 * (4 + 2 + 2) * 4096 + 2 * (4 * 4096 + 4 * 11008) + 4 * 32
    working = tokens * (again + 2 * (2 * 4096 + 3 * 11008))
    gradients = 2 * BUCKET + 2 * n / 8
    assert loss < working + gradients
    evaluated = 2 * 512 * 32000

    def parts(**more):
        return {**dict.fromkeys(KINDS, 0.0), **lying, **more}

    assert plan.parts == {
        "build": {**dict.fromkeys(KINDS, 0.0), "weights": 2 * n, "copies": 2 * matrices},
        "backward": parts(activations=kept + working, gradients=gradients),
        "step": parts(gradients=2 * n / 8, copies=6 * matrices / 8),
        "evaluate": parts(activations=(2 + 25) * evaluated),
    }
    assert plan.phases["backward"] == 2 * n + 12 * n / 8 + kept + working + gradients
    (backward,) = (
        line for line in plan_text(plan, processes=8).splitlines() if line.startswith("backward ")
    )
    assert backward.split()[-3] == f"{(kept + working) / GIB:.1f}"
    frozen = f"{flags} --lora_dim 8 --only_optimize_lora".replace("--gradient_checkpointing", "")
    adapters = plan_step(parse_config(SFTConfig, frozen.split()), world_size=8, dtype="bf16")
    # Norms that do not train keep less. Adapters keep their inputs' products: 4 in the attention, 3
    # in the rest, 8 each.
    layer = 2 * (4 + 2) * 4096 + 2 * (4 * 4096 + 4 * 11008) + 4 * 32 + 2 * 7 * 8
    assert adapters.parts["backward"]["activations"] == tokens * (32 * layer + 10 * 4096) + loss


def test_the_plan_has_rows_of_a_gpu_and_of_a_host():
    flags = "--enable_hybrid_engine --actor_zero_stage 3 --critic_zero_stage 3 --offload "
    flags += "--unpin_actor_parameters "
    flags += (
        "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 --eval_prompts 4"
    )
    plan = ppo(f"{flags} --no_pin_memory", world_size=8)
    text = plan_text(plan, processes=8)
    header, _, *rows = text.partition("\n\n")[2].splitlines()
    kinds = header.split("  ")
    kinds = [kind.strip() for kind in kinds if kind.strip()]
    assert kinds == [
        "GiB a GPU",
        "weights",
        "optimizer",
        "buffers",
        "activations",
        "KV cache",
        "replica",
        "all",
    ]
    cells = {
        row[: header.index("weights")].strip(): row[header.index("weights") :].split()
        for row in rows[:-3]
    }
    # 4 rows of 512 tokens in 32 layers of keys and values; all weights of the actor while it
    # generates, none afterwards.
    assert cells["generate"][-3:-1] == ["1.0", f"{2 * 6_738_415_616 / GIB:.1f}"]
    assert cells["actor backward"][-3:-1] == ["1.0", "0.0"]
    for cell in cells.values():
        assert float(cell[-1]) == pytest.approx(sum(map(float, cell[:-1])), abs=0.3)
    # Actor and critic in bf16: 1.57 GiB of each model per rank, 2 if page-locked. Each rank also
    # has fp32 weights, gradients, moments and a bf16 copy of an eighth.
    trained = 2 * 6_738_415_616 - 32000 * 4096 + 4096
    assert cells["a host of 8"][:2] == [f"{8 * 2 * 2:.1f}", f"{18 * trained / GIB:.1f}"]
    assert set(plan.phases) | {"a host of 8"} == set(cells)


def test_idle_states_take_no_memory_in_generation():
    flags = "--actor_zero_stage 3 --critic_zero_stage 3"
    there, away = ppo(flags, world_size=4), ppo(f"{flags} --offload_idle_states", world_size=4)
    assert away.parts["generate"]["optimizer"] == 0 and there.parts["generate"]["optimizer"] > 0
    assert away.parts["actor step"] == there.parts["actor step"]
    bucket = there.parts["generate"]["buffers"] - away.parts["generate"]["buffers"]
    # The buffers of the gradients.
    assert bucket == 2 * (2 * 6_738_415_616 - 32000 * 4096 + 4096) / 4
