"""Write a miniature model folder with random weights and a byte-level tokenizer, for tests.

python scripts/make_tiny_model.py --family llama --output /tmp/tiny-llama --std 0.5
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dschat.demo.tiny_models import make_tiny_model  # noqa: E402
from dschat.models.families import FAMILIES, TINY_VOCAB  # noqa: E402


def main() -> None:
    """Write the model that the flags describe, and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--family", default="llama", choices=FAMILIES)
    parser.add_argument("--vocab_size", type=int, default=TINY_VOCAB, help="rows of the embedding")
    parser.add_argument("--hidden", type=int, default=64, help="width")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument(
        "--kv_heads", type=int, default=2, help="key and value heads (llama, qwen2, mistral)"
    )
    parser.add_argument("--std", type=float, default=0.02, help="standard deviation of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pad_is_eos", action="store_true", help="pad with the end-of-sequence token"
    )
    arguments = vars(parser.parse_args())
    print(make_tiny_model(arguments.pop("output"), **arguments))


if __name__ == "__main__":
    main()
