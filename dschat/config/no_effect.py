"""Messages about flags that have no effect in a run."""

from typing import Any

from dschat.config.parse import config_dict
from dschat.runtime.hardware import bf16_unit
from dschat.runtime.log import logger

# Flags without effect, and why. Logged once at the start of a run that gives one of them.
WITHOUT_EFFECT = {
    "compute_fp32_loss": "logprobs and losses are always computed in fp32",
    "align_overflow": "engines always step together or not at all",
    "deepspeed": "every run is a DeepSpeed run",
    "deepscale": "every run is a DeepSpeed run",
    "preprocessing_num_workers": "the tokenizer takes all cores, once, before training",
    "actor_dropout": "dropout is off in all four models of step 3",
    "critic_dropout": "dropout is off in all four models of step 3",
}


def announce(config: Any) -> None:
    """Log the given flags that have no effect."""
    given = config_dict(config)
    for name, reason in WITHOUT_EFFECT.items():
        if given.get(name):
            logger.info(f"--{name} has no effect: {reason}")
    if given.get("num_padding_at_beginning", 1) != 1:
        logger.info(
            "--num_padding_at_beginning has no effect: positions come from the attention mask"
        )
    for name in ("zero_stage", "actor_zero_stage", "critic_zero_stage"):
        if given.get(name) == 0 and _is_half(given["dtype"]):
            logger.info(f"--{name} 0 in half precision runs as stage 1, with the same result")
    if not given.get("enable_hybrid_engine"):
        for name, default in (
            ("unpin_actor_parameters", False),
            ("release_inference_cache", False),
            ("inference_tp_size", 1),
        ):
            if given.get(name, default) != default:
                logger.warning(f"--{name} has no effect without --enable_hybrid_engine")
    _announce_memory(config, given)
    if given.get("inference_tp_size", 1) == 1 and given.get("tp_gather_partition_size", 8) != 8:
        logger.info("--tp_gather_partition_size has no effect with --inference_tp_size 1")
    if given.get("top_k") or given.get("top_p", 1.0) < 1.0 or given.get("min_answer_len"):
        logger.warning(
            "--top_k, --top_p and --min_answer_len change what is sampled but not the logprobs: "
            "ratio and KL are biased"
        )
    if given.get("critic_warmup_steps") and given.get("advantage_estimator") != "gae":
        logger.warning(
            "--critic_warmup_steps has no effect: this --advantage_estimator has no critic"
        )
    if given.get("target_kl") is not None and config.updates_per_rollout == 1:
        logger.warning(
            "--target_kl has no effect: each rollout has a single update, so none can be skipped"
        )
    if given.get("kl_target") is not None and not given["kl_coef"]:
        logger.warning("--kl_target has no effect: it multiplies --kl_coef, which is 0 and stays 0")
    if given.get("enable_test_mode") and not given.get("test_stop_step"):
        logger.warning("--enable_test_mode has no effect without --test_stop_step")
    if given["output_dir"] is None:
        logger.info("--output_dir is not given: the trained model will not be saved")


def _announce_memory(config: Any, given: dict[str, Any]) -> None:
    """Log which of the given memory flags have no effect, and what int8 means for the result."""
    if given.get("offload_reference_model") and given.get("kl_coef") == 0:
        logger.info(
            "--offload_reference_model has no effect: with --kl_coef 0 there is no reference"
        )
    if given.get("offload_reference_model") and config.shares_reference:
        logger.info(
            "--offload_reference_model has no effect: "
            "the reference is the trained model with its adapters off"
        )
    for name in ("modules_to_save", "actor_modules_to_save", "critic_modules_to_save"):
        if given.get(name):
            logger.info(
                f"--{name}: the model without its adapters is no longer the one that training "
                "begins from, so a reference or reward model is a copy of it"
            )
    if given.get("offload_reward_model") and config.shares_reward:
        logger.info(
            "--offload_reward_model has no effect on the reward model that is the critic's: "
            "the critic with its adapters off replaces it"
        )
    if given.get("offload_idle_states") and given["offload"]:
        logger.info(
            "--offload_idle_states has no effect: "
            "with --offload the states are always in host memory"
        )
    offloads = any(value for name, value in given.items() if name.startswith("offload"))
    if not given["pin_memory"] and not offloads:
        logger.info("--no_pin_memory has no effect: nothing is offloaded")
    has_adapters = any(value for name, value in given.items() if name.endswith("lora_dim"))
    if not given.get("lora_experts", True) and not has_adapters:
        logger.info("--no_lora_experts has no effect: no model has adapters")
    flag = f"--quantize_frozen {given.get('quantize_frozen')}"
    if given.get("enable_mixed_precision_lora"):
        flag = "--enable_mixed_precision_lora"
    if flag != "--quantize_frozen none":
        kind = "nf4" if flag.endswith("nf4") else "int8"
        logger.info(
            f"{flag}: adapted weights are rounded to {kind} and saved so"
            + ("; reward models are rounded, too" if "actor_lora_dim" in given else "")
        )


def _is_half(dtype: str) -> bool:
    """Return whether a value of --dtype is fp16 or bf16 on this machine."""
    if dtype == "auto":
        import torch  # here, since flags are checked before torch is imported

        return torch.cuda.is_available() or bool(bf16_unit())
    return dtype != "fp32"
