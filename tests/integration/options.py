"""The options that steps 1 and 2 are run with, and the cases of a choice of them."""

from collections.abc import Callable

import pytest
from covers import pairwise, product
from launches import Case

STEPS = 3
NAMES = {1: "sft", 2: "reward", "dpo": "dpo"}
ZERO = {
    "0": "--zero_stage 0",
    "1": "--zero_stage 1",
    "2": "--zero_stage 2",
    "2-offload": "--zero_stage 2 --offload",
    "3": "--zero_stage 3",
    "3-offload": "--zero_stage 3 --offload",
}
DTYPES = {
    "fp32": "--dtype fp32",
    "bf16": "--dtype bf16",
    "fp16": "--dtype fp16 --deepspeed_config {stock}/fp16.json",
}
LORA = {
    "": "",
    "lora": "--lora_dim 4 --lora_alpha 16 --lora_learning_rate 1e-2",
    "only-lora": "--lora_dim 4 --lora_alpha 16 --lora_learning_rate 1e-2 --only_optimize_lora",
}
SWITCHES = {
    "checkpointing": "--gradient_checkpointing",
    "eot": "--add_eot_token",
    "tensorboard": "--enable_tensorboard --tensorboard_path {out}/events",
}
AXES = {
    "zero": tuple(ZERO),
    "family": ("llama", "opt", "gpt2", "gpt_neox", "qwen2", "mistral"),
    "dtype": tuple(DTYPES),
    "lora": tuple(LORA),
    "ranks": (1, 2),
    "accumulation": (1, 2),
    **dict.fromkeys(SWITCHES, (False, True)),
}
MODELS = {1: "{stock}/base/", 2: "{stock}/sft/", "dpo": "{stock}/sft/"}
SHARES = {1: "1,0,0", 2: "0,1,0", "dpo": "0,1,0"}


def case_name(kind: str, options: dict) -> str:
    """Join the values of the axes into one word, without defaults."""
    parts = [kind]
    for name, value in options.items():
        if value is True:
            parts.append(name)
        elif value is not False and value != "":
            parts.append(value if isinstance(value, str) else f"{name}{value}")
    return "-".join(parts)


def supervised_case(step: int, options: dict) -> Case:
    """Return step 1 or 2 with one value of each axis, on toy data."""
    words = [
        f"--model_name_or_path {MODELS[step]}{options['family']}",
        f"--data_path {{stock}}/toy --data_split {SHARES[step]} --max_seq_len 48 "
        f"--max_train_steps {STEPS}",
        f"--learning_rate 1e-2 {DTYPES[options['dtype']]}",
        f"--per_device_train_batch_size 4 --gradient_accumulation_steps {options['accumulation']}",
        "--per_device_eval_batch_size 4",
        ZERO[options["zero"]],
        LORA[options["lora"]],
        *(words for name, words in SWITCHES.items() if options[name]),
    ]
    return Case(
        case_name(NAMES[step], options), ranks=options["ranks"], step=step, argv=" ".join(words)
    )


def case_params(
    make_case: Callable[[dict], Case],
    axes: dict[str, tuple],
    *,
    turns: tuple[str, ...] = (),
    minor: tuple[str, ...] = (),
) -> list:
    """Return parameters (options, case): a pairwise cover, and, marked `slow`, the product.

    Args:
        turns: axes whose values take turns in cover and product, instead of meeting all others.
        minor: axes for which that holds in the product only, or it would be many times as large.
    """
    few = _take_turns(
        pairwise({name: values for name, values in axes.items() if name not in turns}), axes
    )
    full = _take_turns(
        list(product({name: axes[name] for name in axes if name not in turns + minor})), axes
    )
    params = {}
    for options, marks in [(row, []) for row in few] + [(row, [pytest.mark.slow]) for row in full]:
        case = make_case(options)
        mark = pytest.mark.cases(case)
        params.setdefault(
            case.name, pytest.param(options, case, id=case.name, marks=[mark, *marks])
        )
    return list(params.values())


def _take_turns(rows: list[dict], axes: dict[str, tuple]) -> list[dict]:
    """Add values of the missing axes to the rows."""
    found = []
    for number, row in enumerate(rows):
        turn = {name: values[number % len(values)] for name, values in axes.items()}
        found.append({name: {**turn, **row}[name] for name in axes})
    return found
