"""Serve the scores of a reward model to other runs.

    python scripts/serve_reward.py --model REWARD --port 8010

A run of step 3 reads them with --reward_fn "scoring_server(url='http://localhost:8010/score')". The
reward model then needs no memory of that run, and may have any tokenizer and size. Prompts are
rendered as in the reward model's training (run.json).
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.models.inference_device import inference_placement  # noqa: E402
from dschat.models.reward_model import load_reward_model  # noqa: E402
from dschat.models.tokenizer import load_tokenizer  # noqa: E402
from dschat.runtime.log import run_main  # noqa: E402
from dschat.runtime.run_record import recorded_format  # noqa: E402


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub id of the reward model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--batch_size", type=int, default=32, help="answers in a forward pass")
    parser.add_argument(
        "--prompt_format",
        default="auto",
        choices=("auto", "plain", "human_assistant", "chat"),
        help="how prompts are rendered; auto: as in the model's training, if run.json tells it",
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument(
        "--key_env", default="", help="environment variable with the bearer token of requests"
    )
    parser.add_argument("--trust_remote_code", action="store_true")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Load the model and serve it.

    Raises:
        ValueError: a flag is bad, or the model cannot be loaded.
    """
    try:
        import uvicorn

        from dschat.serving.reward_server import Scorer, make_app
    except ImportError as error:
        raise ValueError(
            f"serving needs the extra chat: pip install 'dschat[chat]' ({error})"
        ) from error
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: must be at least 1.")
    token = os.environ.get(args.key_env, "") if args.key_env else ""
    if args.key_env and not token:
        raise ValueError(f"--key_env {args.key_env}: there is no such environment variable.")
    device, dtype = inference_placement(args.dtype)
    remote = dict(trust_remote_code=args.trust_remote_code)
    tokenizer = load_tokenizer(args.model, flag="--model", **remote)
    model = load_reward_model(
        args.model, dtype=dtype, tokenizer=tokenizer, flag="--model", fresh_head=False, **remote
    )
    scorer = Scorer(
        model.to(device).eval(),
        tokenizer,
        prompt_format=recorded_format(args.model, args.prompt_format),
        batch_size=args.batch_size,
        max_tokens=getattr(model.model.config, "max_position_embeddings", None),
    )
    print(f"scores of {args.model}: http://{args.host}:{args.port}/score", flush=True)
    uvicorn.run(make_app(scorer, token=token), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    arguments = parse_args()
    run_main(lambda: main(arguments))
