"""prompt_eval.py and rw_eval.py on miniature models."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dschat.config.eval_tools import PromptEvalConfig
from dschat.config.parse import parse_config
from dschat.data.row import Row
from dschat.demo.tiny_models import make_tiny_model
from dschat.models.causal_lm import load_causal_lm
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROMPT_EVAL = ROOT / "training" / "step1_supervised_finetuning" / "prompt_eval.py"
RW_EVAL = ROOT / "training" / "step2_reward_model_finetuning" / "rw_eval.py"
PROMPTS = ["a cat", "what a long and winding road this is", "b"]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(path: Path, argv: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    load(path).main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Return two families: one whose tokenizer begins texts with <s>, one that pads with its end
    token.
    """
    folder = tmp_path_factory.mktemp("models")
    return {
        "baseline": str(make_tiny_model(folder / "llama", family="llama", std=0.5)),
        "finetune": str(
            make_tiny_model(folder / "gpt2", family="gpt2", std=0.5, seed=2, pad_is_eos=True)
        ),
    }


@pytest.fixture(scope="module")
def reward_folder(models, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = load_tokenizer(models["baseline"])
    torch.manual_seed(0)
    model = load_reward_model(models["baseline"], dtype=torch.float32, tokenizer=tokenizer)
    model.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def two_models(models) -> list[str]:
    paths = (models["baseline"], models["finetune"])
    return ["--model_name_or_path_baseline", paths[0], "--model_name_or_path_finetune", paths[1]]


def alone(path: str, prompt: str, num_tokens: int) -> str:
    """Return the greedy answer to one prompt without padding, token by token."""
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(path, dtype=torch.float32).eval()
    ids = tokenizer(prompt)["input_ids"]
    begin = len(ids)
    for _ in range(num_tokens):
        with torch.no_grad():
            ids = ids + [int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[begin:], skip_special_tokens=True)


@pytest.mark.parametrize("role", ["baseline", "finetune"])
def test_padded_answers_equal_those_to_single_prompts(models, role):
    config = parse_config(PromptEvalConfig, [*two_models(models), "--max_new_tokens", "12"])
    found = load(PROMPT_EVAL).answer(
        [Row(p) for p in PROMPTS], models[role], flag="--x", config=config
    )
    texts = [answers["greedy"][0] for answers in found]
    assert texts == [alone(models[role], prompt, 12) for prompt in PROMPTS]
    assert all(len(set(text)) >= 5 for text in texts) and len(set(texts)) == 3


def test_the_generation_config_of_the_model_is_ignored(models, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in Path(models["baseline"]).iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    settings = json.loads((changed / "generation_config.json").read_text())
    banned = load_tokenizer(models["baseline"])(alone(models["baseline"], PROMPTS[0], 12))[
        "input_ids"
    ][3:]
    settings.update(repetition_penalty=5.0, suppress_tokens=banned, do_sample=True, temperature=9.0)
    (changed / "generation_config.json").write_text(json.dumps(settings))
    config = parse_config(PromptEvalConfig, [*two_models(models), "--max_new_tokens", "12"])
    found = load(PROMPT_EVAL).answer([Row(PROMPTS[0])], str(changed), flag="--x", config=config)
    assert found[0]["greedy"] == [alone(models["baseline"], PROMPTS[0], 12)]


def test_prompt_eval_shows_every_kind_of_answer_of_both_models(
    models, monkeypatch, capsys, tmp_path
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo words\n", encoding="utf-8")
    argv = two_models(models) + [
        "--prompts_file",
        str(prompts),
        "--max_new_tokens",
        "4",
        "--batch_size",
        "1",
    ]
    argv += ["--num_beams", "2", "--num_return_sequences", "3", "--penalty_alpha", "0.5"]
    out = run(PROMPT_EVAL, argv, monkeypatch, capsys)
    assert "prompt 1 of 2\none\n" in out and "prompt 2 of 2\ntwo words\n" in out
    counts = {"greedy": 2, "2 beams": 2, "sampled": 6}
    for title in ("baseline", "fine-tuned"):
        assert {kind: out.count(f"[{title}, {kind}]") for kind in counts} == counts
    assert "--penalty_alpha has no effect" in out
    assert run(PROMPT_EVAL, argv, monkeypatch, capsys) == out  # the same seed


def test_built_in_prompts_of_every_language(models, monkeypatch, capsys):
    questions = load(PROMPT_EVAL).QUESTIONS
    for language, of_language in questions.items():
        argv = [*two_models(models), "--language", language, "--max_new_tokens", "1"]
        out = run(PROMPT_EVAL, argv, monkeypatch, capsys)
        assert all(f"Human: {question}\n\nAssistant:" in out for question in of_language)
        assert "penalty_alpha" not in out


# Flags, and what the message must hold.
BAD_PROMPT_EVAL = {
    "beam groups": (["--num_beam_groups", "2"], ["--num_beam_groups 2", "Leave it at 1"]),
    "numbers": (
        ["--num_beams", "0", "--max_new_tokens", "0"],
        ["--num_beams 0", "--max_new_tokens 0"],
    ),
    "no file": (["--prompts_file", "none.txt"], ["--prompts_file none.txt: no such file"]),
}


@pytest.mark.parametrize("case", BAD_PROMPT_EVAL)
def test_prompt_eval_names_the_flag(case, models, monkeypatch, capsys):
    argv, words = BAD_PROMPT_EVAL[case]
    with pytest.raises(ValueError) as error:
        run(PROMPT_EVAL, two_models(models) + argv, monkeypatch, capsys)
    assert all(word in str(error.value) for word in words)


def test_both_models_are_required(monkeypatch, capsys):
    with pytest.raises(ValueError) as error:
        run(PROMPT_EVAL, [], monkeypatch, capsys)
    assert "--model_name_or_path_baseline is required" in str(error.value)
    assert "--model_name_or_path_finetune is required" in str(error.value)


def test_a_missing_model_is_the_last_line_and_exit_status_1(models):
    argv = [
        "--model_name_or_path_baseline",
        "./nowhere",
        "--model_name_or_path_finetune",
        models["finetune"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, PROMPT_EVAL, *argv], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error (rank 0): --model_name_or_path_baseline './nowhere' does not exist")
    )


def score_alone(folder: str, text: str) -> float:
    """Return the saved classifier's score of an unpadded text that ends with the end token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits.item()


def test_rw_eval_scores_are_those_of_the_saved_classifier(reward_folder, monkeypatch, capsys):
    out = run(
        RW_EVAL, ["--model_name_or_path", reward_folder, "--batch_size", "3"], monkeypatch, capsys
    )
    for prompt, good, bad in load(RW_EVAL).EXAMPLES:
        for word, answer in (("good", good), ("bad ", bad)):
            score = score_alone(reward_folder, f"\n\nHuman: {prompt}\n\nAssistant: {answer}")
            assert f"  {word} {score:8.3f}  {answer}\n" in out
    assert "accuracy" not in out and "is new" not in out


def test_rw_eval_reports_the_accuracy_on_pairs(reward_folder, monkeypatch, capsys, tmp_path):
    texts = [" yes", " no", " perhaps", " never", " always so"]
    scores = {text: score_alone(reward_folder, f"q{text}") for text in texts}
    rows = [{"prompt": "q", "chosen": a, "rejected": b} for a in texts for b in texts if a != b][:7]
    right = sum(scores[row["chosen"]] > scores[row["rejected"]] for row in rows)
    assert 0 < right < 7
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    argv = [
        "--model_name_or_path",
        reward_folder,
        "--pairs_file",
        str(pairs),
        "--num_padding_at_beginning",
        "0",
    ]
    out = run(RW_EVAL, argv, monkeypatch, capsys)
    assert f"accuracy {right / 7:.4f} ({right} of 7 pairs" in out
    mean = sum(scores[row["chosen"]] for row in rows) / 7
    assert f"mean score: chosen {mean:.3f}" in out
    assert "--num_padding_at_beginning has no effect" in out


def test_rw_eval_ends_answers_with_the_token_that_was_added(reward_folder, monkeypatch, capsys):
    plain = run(RW_EVAL, ["--model_name_or_path", reward_folder], monkeypatch, capsys)
    other = run(
        RW_EVAL, ["--model_name_or_path", reward_folder, "--add_eot_token"], monkeypatch, capsys
    )
    assert plain.count("good") == other.count("good") and plain != other


def test_rw_eval_names_the_bad_rows_before_any_model_loads(monkeypatch, capsys, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        '{"prompt": "q", "chosen": "a"}\n'
        '{"chosen": "a"}\n'
        '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
    )
    with pytest.raises(ValueError) as error:
        run(
            RW_EVAL,
            ["--model_name_or_path", "./nowhere", "--pairs_file", str(pairs)],
            monkeypatch,
            capsys,
        )
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and all(line.startswith(f"--pairs_file {pairs}, line") for line in lines)
    assert 'line 2: no field "prompt"' in lines[0] and 'line 1: no field "rejected"' in lines[1]


def test_texts_longer_than_the_learned_positions_are_refused(models, tmp_path, monkeypatch, capsys):
    learned = models["finetune"]  # GPT-2, with 512
    both = [
        "--model_name_or_path_baseline",
        models["baseline"],
        "--model_name_or_path_finetune",
        learned,
    ]
    with pytest.raises(
        ValueError,
        match=f"--max_new_tokens 512: --model_name_or_path_finetune {learned} has learned 512",
    ):
        run(PROMPT_EVAL, [*both, "--max_new_tokens", "512"], monkeypatch, capsys)
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a long way " * 100}) + "\n")
    words = [*both, "--max_new_tokens", "300", "--prompts_file", str(tmp_path / "long.jsonl")]
    # The prompt is cut and still answered.
    assert "[fine-tuned, greedy]" in run(PROMPT_EVAL, words, monkeypatch, capsys)
    reward = tmp_path / "reward"
    tokenizer = load_tokenizer(learned)
    load_reward_model(learned, dtype=torch.float32, tokenizer=tokenizer).model.save_pretrained(
        reward
    )
    tokenizer.save_pretrained(reward)
    with pytest.raises(
        ValueError, match="--max_seq_len 1024: .* has learned 512 positions. Give 512 or less"
    ):
        run(
            RW_EVAL,
            ["--model_name_or_path", str(reward), "--max_seq_len", "1024"],
            monkeypatch,
            capsys,
        )
