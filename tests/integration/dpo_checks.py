"""Functions for the worker: DPO of a model that DeepSpeed-Chat treated as a special case."""

import os
import sys
from pathlib import Path

import torch
from launches import MAINS
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM
from worker import load

from dschat.runtime import dist


def bloom(*, stock: str, out: str, argv: str) -> None:
    """Run DPO of a miniature BLOOM under the name that DeepSpeed-Chat treated as a special case."""
    path = Path(out) / "bigscience" / "bloom-tiny"
    if dist.is_main():
        tokenizer = AutoTokenizer.from_pretrained(f"{stock}/base/llama")
        torch.manual_seed(0)
        model = BloomForCausalLM(
            BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
        )
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    dist.barrier()
    sys.argv = [
        str(MAINS["dpo"]),
        f"--local_rank={os.environ['LOCAL_RANK']}",
        "--output_dir",
        f"{out}/dpo",
        *argv.split(),
    ]
    sys.argv += ["--model_name_or_path", str(path)]
    load(str(MAINS["dpo"])).main()
