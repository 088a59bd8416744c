"""Adapter folders: PEFT loads ours, and those that PEFT writes are merged."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.checkpoint.save_model import save_model
from dschat.models.adapters import ADAPTER_FOLDER, merge_adapter
from dschat.models.causal_lm import load_causal_lm
from dschat.models.lora import add_lora, lora_parameter_names
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from tests.tiny_families import tiny_family_model
from tests.unit.models_helpers import close, random_texts, tiny

FP32 = torch.float32
IDS = random_texts((8,))[0][None]


def with_random_adapters(model, *, only_optimize_lora: bool = True, **options):
    """Add adapters that change the output to the model, and return it."""
    add_lora(model, dim=2, alpha=3.0, only_optimize_lora=only_optimize_lora, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(lora_parameter_names(model)):
            parameter = model.get_parameter(name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("opt", {"use_rslora": True}),
        ("gpt2", {}),
        ("llama", {"target_modules": ["q_proj", ".*layers.1.mlp.*"], "use_rslora": True}),
    ],
)
def test_peft_loads_the_adapter_and_finds_the_merged_model(tmp_path, family, options):
    base = tiny(family)
    model = with_random_adapters(load_causal_lm(base, dtype=FP32), **options)
    save_model(model, load_tokenizer(base), tmp_path / "out")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not close(logits(plain), merged, 0.1)
    adapter = tmp_path / "out" / ADAPTER_FOLDER
    assert close(logits(PeftModel.from_pretrained(plain, adapter)), merged, 1e-4)
    # As a model path, the adapter is the merged model bit for bit.
    again = load_causal_lm(str(adapter), dtype=FP32, tokenizer=load_tokenizer(str(adapter)))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_experts_are_written_and_merged_as_peft_does(tmp_path, family):
    plain = tiny_family_model(family)
    plain.save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(tiny("llama"))
    tokenizer.save_pretrained(tmp_path / "base")
    model = with_random_adapters(load_causal_lm(str(tmp_path / "base"), dtype=FP32))
    save_model(model, tokenizer, tmp_path / "out")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert close(logits(model), merged, 1e-3) and not close(logits(plain), merged, 0.1)
    adapter = tmp_path / "out" / ADAPTER_FOLDER
    assert close(logits(PeftModel.from_pretrained(plain, adapter)), merged, 1e-3)
    again = load_causal_lm(str(adapter), dtype=FP32, tokenizer=tokenizer)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("start", ["reward model", "language model"])
def test_the_adapter_of_a_reward_model_includes_its_head(tmp_path, start):
    base, tokenizer = tiny("llama"), load_tokenizer(tiny("llama"))
    if start == "reward model":
        save_model(
            load_reward_model(base, dtype=FP32, tokenizer=tokenizer).model,
            tokenizer,
            tmp_path / "base",
        )
        base = str(tmp_path / "base")
    model = with_random_adapters(load_reward_model(base, dtype=FP32, tokenizer=tokenizer))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.model.score.weight)
    save_model(model.model, tokenizer, tmp_path / "out")
    adapter = tmp_path / "out" / ADAPTER_FOLDER
    merged = logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"))
    plain = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    assert close(logits(PeftModel.from_pretrained(plain, adapter)), merged, 1e-4)
    # With fresh_head=False a random head is an error; the adapter's head is accepted.
    again = load_reward_model(
        str(adapter), dtype=FP32, tokenizer=load_tokenizer(str(adapter)), fresh_head=False
    )
    assert torch.equal(again.model.score.weight, model.model.score.weight)
    assert close(logits(again.model), merged, 1e-5)


def peft_adapter(path, **options) -> tuple[str, torch.Tensor]:
    """Write an adapter folder with PEFT; return its path and the logits of its model."""
    torch.manual_seed(1)
    options = {
        "r": 4,
        "lora_alpha": 8,
        "init_lora_weights": False,
        "target_modules": ["q_proj", "down_proj"],
        **options,
    }
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny("llama")), LoraConfig(**options)
    )
    model.save_pretrained(path)
    return str(path), logits(model)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"down_proj": 2}}],
)
def test_adapters_written_by_peft_are_merged(tmp_path, options):
    path, expected = peft_adapter(tmp_path / "peft", **options)
    model = load_causal_lm(path, dtype=FP32, tokenizer=load_tokenizer(path))
    assert close(logits(model), expected, 1e-4)
    assert not close(
        logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny("llama"))), 0.1
    )


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama", {"trainable_token_indices": [3, 5]}),
        ("llama", {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [2, 5, 9]}}),
        ("opt", {"trainable_token_indices": [3, 5]}),
    ],
)
@pytest.mark.parametrize("more_rows", [0, 3])
def test_modules_rows_and_vocabularies_of_peft_are_taken_over(tmp_path, family, options, more_rows):
    """Train whole modules or rows with PEFT, also after a vocabulary has grown."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny(family))
    rows = model.get_input_embeddings().num_embeddings + more_rows
    if more_rows:
        model.resize_token_embeddings(rows)
        options = {key: value for key, value in options.items() if key == "modules_to_save"}
    peft = get_peft_model(
        model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], **options)
    )
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    peft.save_pretrained(tmp_path / "peft")
    found = load_causal_lm(
        str(tmp_path / "peft"), dtype=FP32, tokenizer=load_tokenizer(tiny(family))
    )
    ids = torch.tensor([[3, 5, 9, 2, rows - 1]])
    with torch.no_grad():
        expected = peft.eval()(ids).logits
        actual = found.eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny(family))(ids[:, :4]).logits
    assert close(actual[..., :rows], expected, 1e-4)
    assert not close(actual[:, :4, :264], plain, 0.1)
    assert found.get_input_embeddings().num_embeddings == (rows + 7) // 8 * 8


def test_two_values_of_one_matrix_are_refused(tmp_path):
    path, _ = peft_adapter(tmp_path / "peft")
    model = AutoModelForCausalLM.from_pretrained(tiny("opt"))
    weights = model.get_input_embeddings().weight.detach()
    save_file(
        {
            "base_model.model.model.decoder.embed_tokens.weight": weights.clone(),
            "base_model.model.lm_head.weight": 2 * weights,
        },
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="is the embedding in OPTForCausalLM, and .* PEFT first"):
        merge_adapter(model, path, flag="--actor")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"init_lora_weights": "pissa"}, "its start \\(pissa\\) changes the weights of the base"),
        ({"init_lora_weights": "olora"}, "its start \\(olora\\) changes the weights of the base"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(tmp_path, options, words):
    path, _ = peft_adapter(tmp_path / "peft", **options)
    with pytest.raises(ValueError, match=f"--actor .*{words}.*by PEFT first"):
        load_causal_lm(path, dtype=FP32, flag="--actor")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    path, _ = peft_adapter(tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    for base, words in (
        (str(tiny("gpt2")), "has no place for"),
        (None, "no base_model_name_or_path"),
    ):
        config["base_model_name_or_path"] = base
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words):
            load_causal_lm(path, dtype=FP32)
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="peft': its base model .*gone.* does not exist"):
        load_causal_lm(path, dtype=FP32)


def test_no_adapter_is_written_if_it_would_be_incomplete(tmp_path):
    tokenizer, out = load_tokenizer(tiny("llama")), tmp_path / "out"
    save_model(with_random_adapters(load_causal_lm(tiny("llama"), dtype=FP32)), tokenizer, out)
    assert (out / ADAPTER_FOLDER).is_dir()
    # The adapter of an older model is removed.
    save_model(
        with_random_adapters(load_causal_lm(tiny("llama"), dtype=FP32), only_optimize_lora=False),
        tokenizer,
        out,
    )
    assert not (out / ADAPTER_FOLDER).exists()
    path, _ = peft_adapter(tmp_path / "peft")
    save_model(
        with_random_adapters(load_causal_lm(path, dtype=FP32)), tokenizer, tmp_path / "second"
    )
    assert not (tmp_path / "second" / ADAPTER_FOLDER).exists()
