import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from dschat.models.causal_lm import load_causal_lm
from dschat.models.dropout import disable_dropout
from dschat.models.forward import forward_logits, position_ids_from_mask, takes_position_ids
from dschat.models.lora import add_lora
from dschat.models.prepare import enable_checkpointing, freeze_lower_layers
from dschat.models.structure import decoder_layers
from dschat.models.tokenizer import load_tokenizer
from tests.unit.models_helpers import FAMILIES, OPT_350M_LIKE, close, pad, random_texts, tiny

FP32 = torch.float32


def load(family: str, **options):
    return load_causal_lm(tiny(family), dtype=FP32, **options)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="--model_name_or_path .*config.json, weights .model.safetensors"
    ):
        load_causal_lm(str(tmp_path), dtype=FP32)
    folder = shutil.copytree(tiny("llama"), tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match="missing: model-00002-of-00002.safetensors. "):
        load_causal_lm(str(folder), dtype=FP32)
    with pytest.raises(ValueError, match="--actor_model_name_or_path .*does not exist"):
        load_causal_lm(str(tmp_path / "x"), dtype=FP32, flag="--actor_model_name_or_path")


def test_weights_of_another_shape_are_not_initialised_at_random(tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ValueError, match="of another shape: model.layers.0.mlp.down_proj.weight"):
        load_causal_lm(str(folder), dtype=FP32)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="missing: model.layers.2"):
        load_causal_lm(str(folder), dtype=FP32)


def test_the_model_has_the_requested_dtype():
    model = load_causal_lm(tiny("opt"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.config.use_cache


@pytest.mark.parametrize("family", FAMILIES)
def test_vocabulary_grows_by_mean_rows_and_never_shrinks(family):
    tokenizer = load_tokenizer(tiny(family))
    plain = load(family)
    same = load(family, tokenizer=tokenizer)  # 259 tokens, 264 rows
    assert same.get_input_embeddings().weight.shape[0] == 264
    wide = load_causal_lm(
        tiny(family, overrides=(("vocab_size", 320),)), dtype=FP32, tokenizer=tokenizer
    )
    assert wide.config.vocab_size == 320 == wide.get_output_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<new{i}>" for i in range(6)])
    grown = load(family, tokenizer=tokenizer)  # 265 tokens
    assert grown.config.vocab_size == 272 == grown.get_output_embeddings().weight.shape[0]
    for get in ("get_input_embeddings", "get_output_embeddings"):
        new, old = getattr(grown, get)().weight, getattr(plain, get)().weight
        assert torch.equal(new[:264], old)
        assert close(new[264:], old.mean(dim=0).expand(8, -1), 1e-6)
    ids = torch.tensor([[1, 9, 200]])
    assert torch.equal(grown(ids).logits[..., :264], plain(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_set_on_loading_and_can_be_disabled_everywhere(family):
    ids = random_texts((12,))[0][None]
    model = load(family, dropout=0.3).train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    add_lora(model, dim=2, alpha=1, only_optimize_lora=False, dropout=0.4)
    disable_dropout(model)
    assert model.training
    off = model(ids).logits
    assert torch.equal(off, model(ids).logits) and close(off, load(family).eval()(ids).logits, 1e-6)
    assert not any(getattr(m, "p", 0) for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert {v for k, v in vars(model.config).items() if "drop" in k and isinstance(v, float)} == {
        0.0
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_layers_get_no_gradient(family):
    model = load(family)
    with pytest.raises(ValueError, match="--freeze_layers 3 does not fit a model of 2 layers"):
        freeze_lower_layers(model, 3)
    freeze_lower_layers(model, 0)
    assert all(p.requires_grad for p in model.parameters())
    freeze_lower_layers(model, 1)
    name, layers = decoder_layers(model)
    assert len(layers) == 2 and isinstance(model.get_submodule(name), torch.nn.ModuleList)
    assert not any(p.requires_grad for p in layers[0].parameters())
    assert all(p.requires_grad for p in layers[1].parameters())
    outside = {
        n for n, p in model.named_parameters() if not n.startswith(f"{name}.") and p.requires_grad
    }
    tied = family in ("opt", "gpt2")
    assert any("norm" in n or "ln_f" in n for n in outside)
    assert not any("embed" in n or "wpe" in n for n in outside - {"embed_out.weight"})
    assert model.get_output_embeddings().weight.requires_grad == (not tied)


def test_the_decoder_is_the_outermost_list_even_if_a_layer_has_more_experts_than_layers():
    model = load("llama")
    model.model.layers[0].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(5))
    assert decoder_layers(model)[0] == "model.layers"


def test_frozen_layers_cost_no_backward_pass_under_checkpointing():
    model = load("llama").train()
    freeze_lower_layers(model, 1)
    enable_checkpointing(model)
    outputs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(torch.tensor([[1, 9, 80]]), use_cache=False).logits.sum().backward()
    assert [output.requires_grad for output in outputs[:2]] == [False, True]


def test_freezing_covers_the_projection_of_a_narrow_embedding():
    model = load_causal_lm(tiny("opt", overrides=OPT_350M_LIKE), dtype=FP32)
    freeze_lower_layers(model, 1)
    assert not model.model.decoder.project_in.weight.requires_grad
    assert model.model.decoder.project_out.weight.requires_grad


def test_positions_count_attended_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4]])
    assert torch.equal(position_ids_from_mask(mask), expected)
    assert torch.equal(position_ids_from_mask(mask.bool()), expected)


@pytest.mark.parametrize("family", FAMILIES + ("bloom",))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(family, side):
    if family == "bloom":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = dict(vocab_size=264, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.5)
            model = BloomForCausalLM(BloomConfig(**sizes)).eval()
    else:
        model = load(family).eval()
    assert takes_position_ids(model) == (family != "bloom")
    texts = random_texts()
    ids, mask = pad(texts, side=side, pad_id=0)
    logits = forward_logits(model, model, input_ids=ids, attention_mask=mask)
    assert logits.shape == (3, 9, 264)
    for row, text in enumerate(texts):
        alone = model(text[None]).logits[0]
        assert close(logits[row][mask[row].bool()], alone, 1e-5)
    last = forward_logits(model, model, input_ids=ids, attention_mask=mask, logits_to_keep=4)
    assert close(last, logits[:, -4:], 1e-6)


def test_logits_are_cut_if_the_forward_has_no_logits_to_keep(monkeypatch):
    model = load("llama").eval()
    ids = random_texts((6,))[0][None]
    full = model(ids).logits

    class Older(type(model)):  # a family without logits_to_keep
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
            return super().forward(
                input_ids, attention_mask=attention_mask, position_ids=position_ids
            )

    model.__class__ = Older
    cut = forward_logits(
        model, model, input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=2
    )
    assert torch.equal(cut, full[:, -2:])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_checkpointing_gives_the_same_gradients_with_adapters_only(family, use_reentrant):
    ids = random_texts((8,))[0][None]

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        model = load(family, dropout=0.0).train()
        add_lora(model, dim=2, alpha=2, only_optimize_lora=True)
        if checkpointing:
            enable_checkpointing(model, use_reentrant=use_reentrant)
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        model(ids, use_cache=False).logits.float().pow(2).mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert expected.keys() == actual.keys() and any("layers.0" in n or "h.0" in n for n in expected)
    assert any(g.abs().max() > 0 for g in expected.values())
    assert all(close(actual[n], expected[n], 1e-5) for n in expected if expected[n].abs().max() > 0)


def test_generation_keeps_its_cache_under_checkpointing():
    model = load("llama").eval()
    expected = model.generate(torch.tensor([[1, 9, 80]]), max_new_tokens=8, do_sample=False)
    enable_checkpointing(model)
    model.eval()
    assert model.config.use_cache and model(torch.tensor([[1, 9]])).past_key_values is not None
    assert torch.equal(
        model.generate(torch.tensor([[1, 9, 80]]), max_new_tokens=8, do_sample=False), expected
    )


def test_loading_equals_transformers():
    ids = random_texts((8,))[0][None]
    plain = AutoModelForCausalLM.from_pretrained(tiny("qwen2"), dtype=FP32)
    assert torch.equal(plain(ids).logits, load("qwen2").eval()(ids).logits)
