"""Options of step 3 that change the objective, each from a paper, and the checks across them."""

from dataclasses import dataclass
from typing import Literal, Optional

from dschat.config.options import flag
from dschat.config.ppo_options import PPOAlgorithm
from dschat.config.value_checks import above, fields_at_least, in_range


@dataclass(frozen=True)
class PPOObjective:
    """Variants of the objective; docs/algorithms.md has the equations."""

    _argument_group_name = "objective"

    cliprange_high: Optional[float] = flag(
        None,
        "Upper clip range of the ratio; --cliprange is then the lower one (DAPO's clip-higher, Yu "
        "et al. 2025). Default: --cliprange.",
    )
    dual_clip: Optional[float] = flag(
        None,
        "Bound the loss of a token with a negative advantage A by this times -A; above 1 (Ye et "
        "al. 2020). Default: no bound.",
    )
    cispo: bool = flag(
        False,
        "Clip the ratio as a weight without gradient, so that every token is learned (MiniMax-M1, "
        "2025). --cliprange 1 leaves out the lower bound, as the paper does.",
    )
    ratio_level: Literal["token", "sequence"] = flag(
        "token",
        "Probability ratio of each token, or the geometric mean over an answer (GSPO, Zheng et al. "
        "2025), which needs a clip range of about 3e-4.",
    )
    loss_aggregation: Literal["token", "sequence", "constant"] = flag(
        "token",
        "Mean of the policy loss: token (over all tokens of the update; DAPO), sequence (over "
        "answers, of the mean over each; GRPO, Shao et al. 2024), or constant (tokens divided by "
        "answers x --max_answer_seq_len; Dr. GRPO, Liu et al. 2025).",
    )
    advantage_scale: Literal["auto", "none", "group", "batch"] = flag(
        "auto",
        "Divisor of advantages without a critic: none (Dr. GRPO), the standard deviation of the "
        "group's rewards (group; GRPO) or of the whole rollout's (batch; Lite PPO, Liu et al. "
        "2025). auto: group for grpo, none for the others.",
    )
    kl_in: Literal["reward", "loss"] = flag(
        "reward",
        "KL penalty in the reward of each token (InstructGPT, Ouyang et al. 2022) or as a term of "
        "the loss (GRPO, Shao et al. 2024), by --kl_estimator k2 or k3.",
    )
    critic_lam: Optional[float] = flag(
        None,
        "GAE lambda of the critic's targets (VC-PPO, Yuan et al. 2025: 1). Default: as for the "
        "advantages.",
    )
    lam_alpha: Optional[float] = flag(
        None,
        "Length-adaptive lambda of the advantages, 1 - 1 / (alpha x answer length), instead of "
        "--lam (VAPO, Yue et al. 2025: 0.05).",
    )
    overlong_buffer: int = flag(
        0,
        "Penalize answers that end in the last so many tokens before --max_answer_seq_len, "
        "linearly (DAPO's soft overlong punishment, Yu et al. 2025); 0: off.",
    )
    overlong_penalty: float = flag(
        1.0, "That penalty at the limit, in units of the divided reward."
    )
    mask_truncated: bool = flag(
        False,
        "Do not learn from answers that reached --max_answer_seq_len without an end token (DAPO's "
        "overlong filtering, Yu et al. 2025).",
    )
    importance_correction: Literal["none", "truncate", "mask"] = flag(
        "none",
        "Weight the policy loss by p_trainer / p_generator of the sampled tokens: truncate (at "
        "most --importance_cap; TIS, Yao et al. 2025), or mask (0 outside 1 / cap to cap; MIS, Liu "
        "et al. 2025). Needs --enable_hybrid_engine.",
    )
    importance_level: Literal["token", "sequence"] = flag(
        "token", "That weight for each token, or the product over an answer for all its tokens."
    )
    importance_cap: float = flag(2.0, "Bound of that weight, above 1.")
    dynamic_sampling: bool = flag(
        False,
        "Replace groups whose answers all score the same by groups of other prompts (DAPO's "
        "dynamic sampling, Yu et al. 2025).",
    )
    max_extra_rollouts: int = flag(
        4,
        "With --dynamic_sampling: the most generation batches that a rollout draws in addition. "
        "Groups that are still equal then stay.",
    )

    def problems(self) -> list[str]:
        """Return what is wrong with single values, one sentence each."""
        found = fields_at_least(self, ("overlong_buffer", "overlong_penalty"), 0)
        found += fields_at_least(self, ("max_extra_rollouts",), 1)
        found += above("--importance_cap", self.importance_cap, 1)
        if self.cliprange_high is not None:
            found += above("--cliprange_high", self.cliprange_high, 0)
        if self.dual_clip is not None:
            found += above("--dual_clip", self.dual_clip, 1)
        if self.critic_lam is not None:
            found += in_range("--critic_lam", self.critic_lam, 0.0, 1.0)
        if self.lam_alpha is not None:
            found += above("--lam_alpha", self.lam_alpha, 0)
        return found


def objective_problems(
    options: PPOObjective,
    ppo: PPOAlgorithm,
    *,
    num_samples: int,
    max_answer_tokens: int,
    hybrid_engine: bool,
) -> list[str]:
    """Return the combinations of flags that make no sense, one sentence each.

    Args:
        options: the objective.
        ppo: the algorithm.
        num_samples: --num_samples_per_prompt.
        max_answer_tokens: --max_answer_seq_len.
        hybrid_engine: --enable_hybrid_engine.
    """
    found = _loss_problems(options, ppo)
    found += _advantage_problems(options, ppo)
    if options.overlong_buffer > max_answer_tokens:
        found.append(
            f"--overlong_buffer {options.overlong_buffer} is more than --max_answer_seq_len "
            f"{max_answer_tokens}: give a part of it."
        )
    if options.mask_truncated and options.overlong_buffer:
        found.append(
            "--mask_truncated leaves out the answers that --overlong_buffer penalizes most: give "
            "one of the two."
        )
    if options.mask_truncated and ppo.missing_eos_penalty:
        found.append(
            "--mask_truncated leaves out the answers that --missing_eos_penalty penalizes: give "
            "one of the two."
        )
    if options.dynamic_sampling and num_samples < 2:
        found.append(
            "--dynamic_sampling compares answers to one prompt: give --num_samples_per_prompt 2 or "
            "more."
        )
    if options.importance_correction != "none" and not hybrid_engine:
        found.append(
            f"--importance_correction {options.importance_correction} needs "
            "--enable_hybrid_engine: without it the model that is trained also samples, and there "
            "is nothing to correct."
        )
    return found


def _loss_problems(options: PPOObjective, ppo: PPOAlgorithm) -> list[str]:
    found = []
    if options.cispo and options.dual_clip is not None:
        found.append(
            "--dual_clip bounds the clipped loss, which --cispo replaces: give one of the two."
        )
    high = options.cliprange_high
    if high is not None and 0 < high < ppo.cliprange < float("inf"):
        found.append(
            f"--cliprange_high {high} is below --cliprange {ppo.cliprange}: the "
            "upper clip range must be at least the lower one."
        )
    dual = options.dual_clip
    if dual is not None and 1.0 < dual <= 1.0 + ppo.cliprange < float("inf"):
        found.append(
            f"--dual_clip {dual} must be above 1 + --cliprange {ppo.cliprange}: it "
            "bounds ratios that the clip leaves free; 3 is usual."
        )
    if options.kl_in == "loss" and ppo.kl_estimator == "k1":
        found.append(
            "--kl_in loss with --kl_estimator k1: its gradient is 0 in expectation, so it would "
            "not hold the policy near the reference. Give --kl_estimator k2 or k3."
        )
    if options.kl_in == "loss" and not ppo.kl_coef:
        found.append("--kl_in loss with --kl_coef 0 has no penalty: leave out --kl_in.")
    return found


def _advantage_problems(options: PPOObjective, ppo: PPOAlgorithm) -> list[str]:
    found = []
    estimator = ppo.advantage_estimator
    if estimator == "gae" and options.advantage_scale != "auto":
        found.append(
            f"--advantage_scale {options.advantage_scale} scales rewards of answers to one prompt, "
            "and --advantage_estimator gae does not compare them: leave it out; "
            "--whiten_advantages scales its advantages."
        )
    is_whitened = estimator == "reinforce_baseline" and ppo.whiten_advantages
    if is_whitened and options.advantage_scale == "batch":
        found.append(
            "--advantage_scale batch changes nothing before --whiten_advantages: give "
            "--no_whiten_advantages, or leave it out."
        )
    if estimator != "gae":
        for name in ("critic_lam", "lam_alpha"):
            if getattr(options, name) is not None:
                found.append(
                    f"--{name} needs a critic, and --advantage_estimator {estimator} has none."
                )
    return found
