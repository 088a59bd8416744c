import hashlib
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dschat.demo.tiny_models import make_tiny_model
from dschat.models.families import FAMILIES, SHAPES, shape_config
from tests.unit.models_helpers import tiny

# Published numbers of parameters; a tied head counts once.
PUBLISHED = {
    "bloom-1b1": 1_065_314_304,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_shape_names_may_have_an_organisation_and_case_but_must_exist():
    assert shape_config("facebook/opt-1.3b").hidden_size == 2048
    assert shape_config("meta-llama/Llama-2-7b-hf").vocab_size == 32000
    assert shape_config("HuggingFaceTB/SmolLM2-135M-Instruct").num_key_value_heads == 3
    with pytest.raises(ValueError, match="opt-9b.*opt-125m"):
        shape_config("opt-9b")


def digest(folder) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_reproducible_to_the_byte(family, tmp_path):
    # The caller's random state has no effect and does not change.
    torch.manual_seed(hash(family) % 1000)
    state = torch.get_rng_state()
    again = make_tiny_model(tmp_path / "again", family=family, std=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(again) == digest(tiny(family))
    other = make_tiny_model(tmp_path / "other", family=family, std=0.5, seed=1)
    assert digest(other)["model.safetensors"] != digest(again)["model.safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_have_the_given_shape_and_standard_deviation(family):
    model = AutoModelForCausalLM.from_pretrained(tiny(family))
    assert model.config.vocab_size == 264 == SHAPES[f"tiny-{family}"].vocab
    assert 0.45 < model.get_input_embeddings().weight[3:].std().item() < 0.55
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family in ("opt", "gpt2"))
    ids = torch.tensor([[5, 60, 110]])
    new = model.generate(
        ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 3:]
    assert len(set(new.tolist())) >= 8  # at the usual 0.02 it would be one or two


def test_the_script_writes_the_same_folder(tmp_path, monkeypatch):
    script = Path(__file__).parents[3] / "scripts" / "make_tiny_model.py"
    arguments = ["--family", "llama", "--std", "0.5", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    assert digest(tmp_path / "out") == digest(tiny("llama"))


def test_wrong_sizes_are_refused(tmp_path):
    for wrong in (
        dict(family="t5"),
        dict(vocab_size=100),
        dict(hidden=66),
        dict(heads=4, kv_heads=3),
    ):
        with pytest.raises(ValueError, match="--"):
            make_tiny_model(tmp_path / "x", **wrong)
