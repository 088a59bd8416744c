"""Greedy answers of a model folder, for the eye."""

import torch
from transformers import GenerationConfig

from dschat.models.causal_lm import load_causal_lm
from dschat.models.tokenizer import eos_token_ids, load_tokenizer


def greedy_answers(path: str, prompts: list[str], *, max_new_tokens: int) -> list[str]:
    """One greedy answer to each prompt, as text, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(path)
    model = (
        load_causal_lm(path, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        .to(device)
        .eval()
    )
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(device)
    end_ids = list(eos_token_ids(model.generation_config, tokenizer))
    model.generation_config = (
        GenerationConfig()
    )  # or what it holds would fill in what is not given here
    with torch.no_grad():
        sequences = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(
        sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
