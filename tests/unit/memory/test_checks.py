"""Checks of models' shapes before any weight is read, and the cuts of layers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, OPTConfig, Qwen3Config

from dschat import plan
from dschat.config import no_effect
from dschat.config.dpo import DPOConfig
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig
from dschat.generation.tensor_parallel import (
    RowwiseLinear,
    TensorGroup,
    split_layers,
    split_plan,
    split_problems,
)
from dschat.memory.checks import check_models, checked_plan
from dschat.memory.model_size import _learned_positions
from dschat.memory.plan import plan_step
from dschat.models.families import shape_config
from dschat.models.structure import decoder_layers
from dschat.trainers import preflight

SPLIT = "--enable_hybrid_engine --actor_zero_stage 3"


def check(
    actor: str, flags: str, *, critic: str = "opt-350m", world_size: int = 8, rewards=()
) -> None:
    words = (
        f"--actor_model_name_or_path {actor} --critic_model_name_or_path {critic} {flags}".split()
    )
    config = parse_config(PPOConfig, words)
    found = plan_step(config, world_size=world_size, dtype="bf16")
    check_models(config, found, world_size=world_size, rewards=rewards)


@pytest.mark.parametrize(
    "actor, size, world_size, message",
    [
        (
            "opt-1.3b",
            3,
            6,
            "--inference_tp_size 3 does not divide the model's 32 attention heads: "
            "give a divisor of 32, or 1",
        ),
        ("opt-125m", 8, 8, "does not divide the model's 12 attention heads"),
        (
            "smollm2-135m",
            9,
            9,
            "--inference_tp_size 9 does not divide the model's 3 key-value heads",
        ),
        (
            "llama-2-7b",
            4,
            6,
            r"--inference_tp_size 4 does not divide the 6 process\(es\) of this run: "
            "give a divisor of 6",
        ),
        (
            "tiny-gpt2",
            2,
            2,
            "--inference_tp_size 2: how to split a model of type gpt2 is not known: "
            "give --inference_tp_size 1",
        ),
        ("bloom-1b1", 2, 2, "type bloom is not known"),
    ],
)
def test_models_that_cannot_be_split_are_refused(actor, size, world_size, message):
    with pytest.raises(ValueError, match=message):
        check(actor, f"{SPLIT} --inference_tp_size {size}", world_size=world_size)


def test_models_that_can_be_split_are_accepted():
    for actor in (
        "opt-1.3b",
        "llama-2-70b",
        "tiny-qwen2",
        "tiny-mistral",
        "tiny-gpt_neox",
        "tiny-llama",
    ):
        check(actor, f"{SPLIT} --inference_tp_size 2 --max_prompt_seq_len 64")
    check("tiny-gpt2", f"{SPLIT} --max_prompt_seq_len 64")
    # Without the Hybrid Engine, --inference_tp_size has no effect; a message says so.
    check("tiny-gpt2", "--actor_zero_stage 3 --inference_tp_size 2 --max_prompt_seq_len 64")


def test_feed_forward_columns_are_divided_too():
    config = OPTConfig(ffn_dim=30, hidden_size=16, num_attention_heads=4, num_hidden_layers=1)
    assert split_problems(config, 4, world_size=4) == [
        "--inference_tp_size 4 does not divide the model's 30 feed-forward columns: "
        "give a divisor of 30, or 1."
    ]


def test_packed_matrices_and_experts_are_not_split():
    from transformers import MixtralConfig, Phi3Config

    assert split_plan(Phi3Config()) == split_plan(MixtralConfig()) == {}
    assert split_plan(Qwen3Config())[
        "self_attn.q_proj"
    ] == "colwise" and "self_attn.q_norm" not in split_plan(Qwen3Config())


@pytest.mark.parametrize("engine", ["", SPLIT])
@pytest.mark.parametrize(
    "actor, critic, prompt, flag, most",
    [
        ("opt-1.3b", "opt-350m", 1793, "--actor_model_name_or_path opt-1.3b", 2048),
        ("tiny-gpt2", "opt-350m", 257, "--actor_model_name_or_path tiny-gpt2", 512),
        ("llama-2-7b", "opt-350m", 1793, "--critic_model_name_or_path opt-350m", 2048),
    ],
)
def test_texts_longer_than_learned_positions_are_refused(engine, actor, critic, prompt, flag, most):
    message = f"--max_prompt_seq_len {prompt} and --max_answer_seq_len 256 make texts of "
    message += f"{prompt + 256} tokens, and {flag} "
    with pytest.raises(
        ValueError,
        match=f"{message}has learned {most} positions: give lengths that add up to {most}",
    ):
        check(actor, f"{engine} --max_prompt_seq_len {prompt}", critic=critic)
    check(actor, f"{engine} --max_prompt_seq_len {prompt - 1}", critic=critic)


def test_positions_limit_reward_models_of_the_same_tokens_unless_they_are_computed():
    flags = "--max_prompt_seq_len 4000 --reward_model_name_or_path opt-350m"
    check("llama-2-7b", flags, critic="llama-2-7b")
    with pytest.raises(
        ValueError, match="--reward_model_name_or_path opt-350m has learned 2048 positions"
    ):
        check("llama-2-7b", flags, critic="llama-2-7b", rewards=["opt-350m"])
    check("llama-2-7b", "--max_prompt_seq_len 6000", critic="bloom-1b1")


@pytest.mark.parametrize("step", [SFTConfig, RewardConfig, DPOConfig])
def test_positions_limit_texts_of_the_other_steps(step):
    for name, length in (("opt-1.3b", 2048), ("tiny-gpt2", 512), ("llama-2-7b", None)):
        words = f"--model_name_or_path {name} --max_seq_len"
        checked_plan(
            parse_config(step, f"{words} {length or 100_000}".split()), world_size=1, dtype="bf16"
        )
        if length is None:
            continue
        config = parse_config(step, f"{words} {length + 1}".split())
        message = f"--max_seq_len {length + 1}: --model_name_or_path {name} has learned "
        message += f"{length} positions. Give {length} or less"
        with pytest.raises(ValueError, match=message):
            checked_plan(config, world_size=1, dtype="bf16")


@pytest.mark.parametrize("config_class", [SFTConfig, RewardConfig, DPOConfig])
def test_packing_needs_position_ids(config_class):
    flags = "--model_name_or_path bloom-1b1 --packing".split()
    with pytest.raises(ValueError, match="--packing: bloom models, such as .* bloom-1b1"):
        checked_plan(parse_config(config_class, flags), world_size=1, dtype="bf16")


def test_token_tables_do_not_count_as_positions():
    """Gemma 3n has token vectors for each layer, more rows than it has positions."""
    config = Gemma3nTextConfig(
        hidden_size=16, num_hidden_layers=2, vocab_size=200, vocab_size_per_layer_input=200,
        max_position_embeddings=64,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        hidden_size_per_layer_input=8,
        laurel_rank=4, num_kv_shared_layers=0, layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert _learned_positions(model, config) is None


def test_runs_dry_runs_and_plans_refuse_too_long_texts(monkeypatch):
    words = "--actor_model_name_or_path opt-1.3b --critic_model_name_or_path opt-350m"
    words += " --max_prompt_seq_len 2000"
    config = parse_config(PPOConfig, words.split())
    for start in (
        lambda: preflight.show_plan(config, dtype="bf16"),
        lambda: preflight.dry_run(config),
    ):
        with pytest.raises(ValueError, match="has learned 2048 positions"):
            start()
    with pytest.raises(ValueError, match=r"--inference_tp_size 2 does not divide the 1 process"):
        plan.main(f"--step 3 --model opt-1.3b {SPLIT} --inference_tp_size 2".split())


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2", "mistral", "gpt_neox"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_rank_has_its_slice_of_every_matrix(family, index):
    config = shape_config(f"tiny-{family}")
    with torch.device("meta"):
        whole, model = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    group = TensorGroup(2, index, 0, None)
    cut = split_layers(model, group)
    shapes = {name: p.shape for name, p in whole.named_parameters()}
    names = {
        (module, leaf): f"{path}.{leaf}"
        for path, module in model.named_modules()
        for leaf in module._parameters
    }
    dims = {names[key]: dim for key, dim in cut.items()}
    for name, p in model.named_parameters():
        expected = list(shapes[name])
        if name in dims:
            expected[dims[name]] //= 2
        assert list(p.shape) == expected, name
    prefix, layers = decoder_layers(model)
    for name, p in whole.named_parameters():
        in_layer = name.startswith(f"{prefix}.")
        assert (name in dims) == (in_layer and (p.dim() == 2 or is_colwise_bias(name))), name
    assert sum(isinstance(module, RowwiseLinear) for module in model.modules()) == 2 * len(layers)
    assert (
        group.slice(torch.arange(6).view(2, 3), 0).tolist()
        == [[0, 1, 2], [3, 4, 5]][index : index + 1]
    )
    if family == "opt":
        assert {layer.self_attn.num_heads for layer in layers} == {2}


def is_colwise_bias(name: str) -> bool:
    ends = (
        "q_proj.bias",
        "k_proj.bias",
        "v_proj.bias",
        "fc1.bias",
        "query_key_value.bias",
        "dense_h_to_4h.bias",
    )
    return name.endswith(ends)


def announced(flags: str, monkeypatch, *levels: str) -> list[str]:
    """Return the messages of a step 3 with these flags at its start, on these levels of the log."""
    lines: list[str] = []
    for level in levels:
        monkeypatch.setattr(no_effect.logger, level, lines.append)
    words = f"--actor_model_name_or_path opt-1.3b --critic_model_name_or_path opt-350m {flags}"
    no_effect.announce(parse_config(PPOConfig, words.split()))
    return lines


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            "--actor_zero_stage 3 --inference_tp_size 2",
            "--inference_tp_size has no effect without --enable_hybrid_engine",
        ),
        (
            f"{SPLIT} --tp_gather_partition_size 4",
            "--tp_gather_partition_size has no effect with --inference_tp_size 1",
        ),
        (f"{SPLIT} --inference_tp_size 2 --tp_gather_partition_size 4", ""),
    ],
)
def test_split_flags_without_effect_are_reported(flags, said, monkeypatch):
    lines = announced(flags, monkeypatch, "info", "warning")
    found = [line for line in lines if "_tp_size" in line or "tp_gather" in line]
    assert found == ([said] if said else [])


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            "--target_kl 0.1",
            ["--target_kl has no effect: each rollout has a single update, so none can be skipped"],
        ),
        ("--target_kl 0.1 --ppo_epochs 2", []),
        ("--target_kl 0.1 --per_device_training_batch_size 8", []),
        (
            "--target_kl 0.1 --per_device_training_batch_size 8 --gradient_accumulation_steps 2",
            ["--target_kl has no effect"],
        ),
        (
            "--kl_coef 0 --kl_target 6",
            ["--kl_target has no effect: it multiplies --kl_coef, which is 0 and stays 0"],
        ),
        ("--kl_target 6", []),
        ("--kl_coef 0", []),
    ],
)
def test_targets_without_effect_are_reported(flags, said, monkeypatch):
    lines = announced(flags, monkeypatch, "warning")
    assert len(lines) == len(said) and all(
        line.startswith(start) for line, start in zip(lines, said)
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--no_pin_memory", ["--no_pin_memory has no effect: nothing is offloaded"]),
        ("--no_pin_memory --offload_reference_model", []),
        ("--no_pin_memory --offload", []),
        ("", []),
    ],
)
def test_pin_memory_without_effect_is_reported(flags, said, monkeypatch):
    lines = announced(flags, monkeypatch, "info")
    assert [line for line in lines if "pin_memory" in line] == said


@pytest.mark.parametrize("name", ["inference_tp_size", "tp_gather_partition_size"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"--{name} 0: must be at least 1"):
        check("opt-1.3b", f"{SPLIT} --{name} 0")
