"""Generate one rollout with vLLM, for bench_slots.py: JSON on standard input, a row as JSON out."""

import json
import os
import sys
import time

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_USE_FLASHINFER_SAMPLER="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)


def main() -> None:
    """Measure the rollout."""
    import vllm

    work = json.load(sys.stdin)
    memory = dict(gpu_memory_utilization=0.9)
    if work["cache_bytes"]:
        memory["kv_cache_memory_bytes"] = work["cache_bytes"]
    engine = vllm.LLM(
        work["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=work["dtype"],
        max_model_len=work["max_length"],
        max_num_seqs=work["max_seqs"],
        enable_prefix_caching=work["copies"] > 1,
        **memory,
    )
    settings = vllm.SamplingParams(
        n=work["copies"],
        temperature=1.0,
        max_tokens=work["answer"],
        min_tokens=0 if work["ends"] else work["answer"],
        stop_token_ids=work["ends"],
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
    rates = []
    for _ in range(work["repeats"] + 1):
        if work["copies"] > 1:
            engine.reset_prefix_cache()  # prompts are new in every rollout
        started = time.perf_counter()
        found = engine.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - started
        rates.append(sum(len(one.token_ids) for row in found for one in row.outputs) / seconds)
    row = {"engine": f"vLLM {vllm.__version__}", "tokens_per_s": max(rates[1:])}
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
