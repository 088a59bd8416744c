"""Merge an adapter folder into its base model, and save the result as a model folder:

    python -m dschat.merge output/actor/adapter merged

The base is read again in full precision. After training with --quantize_frozen this is the model
without quantized rounding; the model folder beside the adapter holds the rounded weights.
"""

import argparse
from typing import Any

from dschat.models.adapters import adapter_has_head
from dschat.models.causal_lm import load_causal_lm
from dschat.models.export import save_pretrained_folder
from dschat.models.inference_device import TORCH_DTYPES
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import adapter_base, load_tokenizer, model_source
from dschat.runtime.log import run_main


def main(argv: list[str] | None = None) -> None:
    """Merge the adapter that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="an adapter folder of PEFT's format")
    parser.add_argument("output", help="the model folder to write")
    parser.add_argument(
        "--dtype",
        default="bf16",
        choices=tuple(TORCH_DTYPES),
        help="of the weights (default: bf16)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the base's own code")
    args = parser.parse_args(argv)
    merge(args.adapter, args.output, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    print(f"saved {args.output}")


def merge(adapter: str, output: str, *, dtype: str, trust_remote_code: bool = False) -> None:
    """Write the model of an adapter folder, a language model or a reward model.

    Args:
        adapter: the adapter folder, which names its base.
        output: the model folder to write; a model in it is replaced.
        dtype: of the weights, a key of TORCH_DTYPES.
        trust_remote_code: allow Python code that comes with the base.

    Raises:
        ValueError: no adapter folder, or one that cannot be merged.
    """
    source, is_local = model_source(adapter, flag="adapter")
    if not is_local or not adapter_base(source, flag="adapter"):
        raise ValueError(
            f"{adapter} is no adapter folder: it needs adapter_config.json, and no config.json. "
            "Give the folder adapter/ inside a model folder."
        )
    trust: dict[str, Any] = dict(trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, flag="adapter", **trust)
    loading = dict(dtype=TORCH_DTYPES[dtype], tokenizer=tokenizer, flag="adapter", **trust)
    if adapter_has_head(source, flag="adapter"):
        model = load_reward_model(source, fresh_head=False, **loading).model
    else:
        model = load_causal_lm(source, **loading)
    save_pretrained_folder(model, dict(model.state_dict()), tokenizer, output)


if __name__ == "__main__":
    run_main(main)
