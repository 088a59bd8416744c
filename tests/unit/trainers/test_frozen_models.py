"""Reference and reward models in the storage of the trained models."""

from functools import partial

import pytest
import torch

from dschat.config.options import LoraOptions, SystemOptions
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.engine.quantized import QuantizedLinear, quantize_linears
from dschat.models.lora import adapted_layer_names, adapters_disabled
from dschat.models.prepare import prepare_for_training
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from dschat.trainers.frozen_models import rounded
from tests.unit.models_helpers import tiny

FLAGS = "--actor_model_name_or_path a --critic_model_name_or_path c --actor_lora_dim 2 "


def load(lora: LoraOptions, kind: str):
    torch.manual_seed(0)
    options = dict(dtype=torch.float32, tokenizer=load_tokenizer(tiny("llama")))
    return partial(rounded(load_reward_model, kind, lora), tiny("llama"), **options)()


def layers(model) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_reward_model_scores_as_the_critic_that_replaces_it(kind):
    lora = LoraOptions(lora_dim=2, target_modules=["q_proj", "up_proj"], only_optimize_lora=True)
    critic = load(lora, "none")
    assert layers(critic) == []
    prepare_for_training(critic, lora=lora, system=SystemOptions())
    quantize_linears(critic, adapted_layer_names(critic), kind)
    reward = load(lora, kind)
    assert len(layers(reward)) == len(layers(critic)) == 4
    ids = torch.arange(3, 13)[None]
    with torch.no_grad(), adapters_disabled(critic):
        assert torch.equal(reward(ids, None), critic(ids, None))
        assert not torch.equal(reward(ids, None), load(lora, "none")(ids, None))


def test_all_layers_of_other_reward_models_are_rounded():
    config = parse_config(
        PPOConfig,
        (
            f"{FLAGS} --critic_lora_dim 2 --critic_target_modules q_proj --quantize_frozen nf4 "
            "--reward_model_name_or_path r c"
        ).split(),
    )
    assert config.reward_format == "nf4"
    assert config.reward_lora("c") == config.critic_lora and config.reward_lora("r").lora_dim == 0
    assert len(layers(load(config.reward_lora("r"), "nf4"))) == 14
    old = parse_config(PPOConfig, f"{FLAGS} --enable_mixed_precision_lora".split())
    assert old.reward_format == "int8" and old.reward_lora("c") == LoraOptions()
    assert parse_config(PPOConfig, FLAGS.split()).reward_format == "none"
