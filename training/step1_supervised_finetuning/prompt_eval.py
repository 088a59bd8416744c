"""Print answers of a model before and after training to the same prompts."""

from functools import partial
from textwrap import indent

from dschat.config.eval_tools import Answering, PromptEvalConfig
from dschat.config.parse import parse_config
from dschat.runtime.log import run_main

if __name__ == "__main__":
    # Stop at a wrong flag or --help before the imports below, which take seconds.
    run_main(partial(parse_config, PromptEvalConfig))

import torch
from torch.utils.data import DataLoader
from transformers import GenerationConfig

from dschat.data.collate import collate_prompts
from dschat.data.datasets import PromptDataset
from dschat.data.prompt_files import read_rows
from dschat.data.row import Row
from dschat.memory.model_size import named_size
from dschat.models.causal_lm import load_causal_lm
from dschat.models.inference_device import inference_placement
from dschat.models.tokenizer import eos_token_ids, load_tokenizer
from dschat.runtime.run_record import recorded_format

QUESTIONS = {
    "English": (
        "Why does the sea taste of salt?",
        "Explain to a ten-year-old what a library is for.",
        "Write two lines about the first snow of the year.",
        "How do I keep basil alive on a window sill?",
        "What should I think about before I adopt a dog?",
    ),
    "Chinese": (
        "海水为什么是咸的？",
        "请给十岁的孩子解释一下图书馆是做什么的。",
        "请用两行文字描写今年的第一场雪。",
        "怎样在窗台上养好一盆罗勒？",
        "领养一只狗之前应该考虑些什么？",
    ),
    "Japanese": (
        "海の水はなぜしょっぱいのですか？",
        "図書館は何のためにあるのか、十歳の子どもに説明してください。",
        "今年の初雪について二行で書いてください。",
        "窓辺でバジルを枯らさずに育てるにはどうすればいいですか？",
        "犬を引き取る前に何を考えておくべきですか？",
    ),
}


def decodings(answering: Answering, **ids) -> dict[str, GenerationConfig]:
    """Return the GenerationConfig of each kind of answer to print, by name.

    Args:
        answering: the options.
        ids: ``eos_token_id`` and ``pad_token_id``.
    """
    common = dict(max_new_tokens=answering.max_new_tokens, **ids)
    kinds = {"greedy": GenerationConfig(do_sample=False, num_beams=1, **common)}
    if answering.num_beams > 1:
        kinds[f"{answering.num_beams} beams"] = GenerationConfig(
            do_sample=False, num_beams=answering.num_beams, **common
        )
    if answering.num_return_sequences > 1:
        number = answering.num_return_sequences
        kinds["sampled"] = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=answering.top_k,
            top_p=1.0,
            num_return_sequences=number,
            **common,
        )
    return kinds


def max_prompt_tokens(path: str, config: PromptEvalConfig, *, flag: str) -> int:
    """Return the length limit of a prompt in tokens.

    It is --max_prompt_seq_len, or less if the model has learned too few positions for such a prompt
    and an answer.

    Raises:
        ValueError: there is no room for a prompt.
    """
    size = named_size(path, flag=flag, trust_remote_code=config.model.trust_remote_code)
    limit = config.prompts.max_prompt_seq_len
    new_tokens = config.answering.max_new_tokens
    if size.positions is None:
        return limit
    if new_tokens >= size.positions:
        raise ValueError(
            f"--max_new_tokens {new_tokens}: {flag} {path} has learned {size.positions} positions "
            "for prompt and answer together. Give a smaller number."
        )
    return min(limit, size.positions - new_tokens)


def answer(
    rows: list[Row], path: str, *, flag: str, config: PromptEvalConfig
) -> list[dict[str, list[str]]]:
    """Generate answers of the model at `path`.

    Returns:
        For each row its answers, by the names of ``decodings``.
    """
    device, dtype = inference_placement(config.model.dtype)
    options = dict(trust_remote_code=config.model.trust_remote_code, flag=flag)
    max_prompt_len = max_prompt_tokens(path, config, flag=flag)
    tokenizer = load_tokenizer(
        path, add_eot_token=config.model.add_eot_token, eot_token=config.model.eot_token, **options
    )
    model = load_causal_lm(path, dtype=dtype, tokenizer=tokenizer, **options).to(device).eval()
    eos = list(eos_token_ids(model.generation_config, tokenizer))
    kinds = decodings(config.answering, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    # transformers fills gaps from the GenerationConfig of the model, which may ban or force tokens.
    model.generation_config = GenerationConfig()
    prompts = PromptDataset(
        rows,
        tokenizer,
        max_prompt_len=max_prompt_len,
        prompt_format=recorded_format(path, config.prompts.prompt_format),
        truncation="share",
    )
    collate = partial(collate_prompts, pad_id=tokenizer.pad_token_id)
    answers: list[dict[str, list[str]]] = []
    torch.manual_seed(config.answering.seed)
    for batch in DataLoader(prompts, batch_size=config.prompts.batch_size, collate_fn=collate):
        batch = batch.to(device)
        found: list[dict[str, list[str]]] = [{} for _ in batch.index]
        for kind, generation in kinds.items():
            with torch.no_grad():
                sequences = model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_config=generation,
                )
            texts = tokenizer.batch_decode(
                sequences[:, batch.input_ids.shape[1] :], skip_special_tokens=True
            )
            number = len(texts) // len(found)
            for i, row_answers in enumerate(found):
                row_answers[kind] = texts[i * number : (i + 1) * number]
        answers += found
    return answers


def main() -> None:
    """Print the answers of both models, prompt by prompt."""
    config = parse_config(PromptEvalConfig)
    if config.answering.penalty_alpha != Answering.penalty_alpha:
        print("--penalty_alpha has no effect: transformers no longer has contrastive search")
    if config.prompts.prompts_file:
        rows = read_rows(config.prompts.prompts_file, flag="--prompts_file")
    else:
        rows = [
            Row(f"\n\nHuman: {question}\n\nAssistant:")
            for question in QUESTIONS[config.prompts.language]
        ]
    # One model after the other, so that only one has to fit in memory.
    answers = {
        title: answer(rows, getattr(config.model, name), flag=f"--{name}", config=config)
        for title, name in (
            ("baseline", "model_name_or_path_baseline"),
            ("fine-tuned", "model_name_or_path_finetune"),
        )
    }
    for i, row in enumerate(rows):
        prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
        print(f"\n{'-' * 40} prompt {i + 1} of {len(rows)}\n{prompt.strip()}")
        for kind in answers["baseline"][i]:
            for title, of_rows in answers.items():
                for text in of_rows[i][kind]:
                    print(f"[{title}, {kind}]\n{indent(text.strip(), '    ')}")


if __name__ == "__main__":
    run_main(main)
