"""Greedy answers of a saved model, to be read by people."""

import torch
from transformers import GenerationConfig

from dschat.models.causal_lm import load_causal_lm
from dschat.models.tokenizer import eos_token_ids, load_tokenizer


def greedy_answers(path: str, prompts: list[str], *, max_new_tokens: int) -> list[str]:
    """Return a greedy answer to each prompt, as text.

    The model runs on the GPU in bf16 if there is one, else on the CPU in fp32.
    """
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(path, dtype=torch.bfloat16 if on_gpu else torch.float32)
    model = model.to(device).eval()
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(device)
    end_ids = list(eos_token_ids(model.generation_config, tokenizer))
    # Else the model's generation config fills in what the call below leaves open.
    model.generation_config = GenerationConfig()
    with torch.no_grad():
        sequences = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
    answer_ids = sequences[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
