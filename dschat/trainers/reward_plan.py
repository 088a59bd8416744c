"""From options to rewards. Everything that can be checked is checked before a model loads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dschat.config.ppo import PPOConfig
from dschat.models.reward_model import check_reward_model
from dschat.models.tokenizer import ensure_unambiguous_pad, load_tokenizer
from dschat.rewards.loading import load_function
from dschat.rewards.pool import WorkerPool
from dschat.runtime.log import logger
from dschat.trainers.rewards import (
    FunctionReward,
    ModelReward,
    RetokenisedReward,
    Reward,
    WeightedRewards,
    check_critic_tokenizer,
    reads_actor_tokens,
    same_tokens,
)


@dataclass
class RewardPlan:
    """The rewards of a run, and the tokenizers. Models load at the first ``build``."""

    config: PPOConfig
    tokenizer: PreTrainedTokenizerBase  # the actor's
    critic_tokenizer: object | None  # None without a critic
    model_tokenizers: dict[str, object]  # by path of the reward model
    functions: dict[str, Callable]  # by the value of --reward_fn
    _rewards: list[Reward] | None = None

    def models_reading_actor_tokens(self) -> list[str]:
        """Return the reward models that read the actor's token ids, without tokenizing again."""
        return [path for path in self.model_tokenizers if self._reads_actor_tokens(path)]

    def _reads_actor_tokens(self, path: str) -> bool:
        other = self.model_tokenizers[path]
        model = self.config.model
        if not model.reward_model_name_or_path:
            # The critic's initial model: it must read the actor's tokens whatever its template.
            return same_tokens(self.tokenizer, other)
        return reads_actor_tokens(
            self.tokenizer,
            other,
            prompt_format=self.config.data.prompt_format,
            reward_prompt_format=model.reward_prompt_format,
        )

    def build(self, engines, dataset) -> WeightedRewards:
        """Return the rewards for answers to the prompts of `dataset`. Every rank must call it."""
        if self._rewards is None:
            self._rewards = [self._model_reward(engines, path) for path in self.model_tokenizers]
            self._rewards += [
                self._function_reward(name, function) for name, function in self.functions.items()
            ]
            for reward in self._rewards:
                logger.info(f"reward: {reward.name} ({type(reward).__name__})")
        return WeightedRewards(
            self._rewards, self.config.model.reward_weights, dataset, self.tokenizer
        )

    def _function_reward(self, name: str, function: Callable) -> FunctionReward:
        options = self.config.model
        pool = None
        if options.reward_workers:
            pool = WorkerPool(
                name, num_workers=options.reward_workers, timeout_s=options.reward_timeout_s
            )
        return FunctionReward(function, name, on_error=options.on_reward_error, pool=pool)

    def _model_reward(self, engines, path: str) -> Reward:
        tokenizer = self.model_tokenizers[path]
        engine = engines.add_reward(path, flag=self.config.reward_flag, tokenizer=tokenizer)
        if self._reads_actor_tokens(path):
            tokens = self.config.batch.scoring_tokens_per_batch
            return ModelReward(engine, path, tokens_per_batch=tokens)
        logger.info(
            f"{path} has another tokenizer, chat template or prompt format than the actor: "
            "answers are decoded and tokenized again"
        )
        return RetokenisedReward(
            engine,
            path,
            tokenizer,
            prompt_format=self.config.model.reward_prompt_format,
            max_tokens=getattr(engine.module.model.config, "max_position_embeddings", None),
        )


def plan_rewards(
    config: PPOConfig, tokenizer, *, functions: Mapping[str, Callable] | None = None
) -> RewardPlan:
    """Load the tokenizers and functions of the rewards, and check that the critic fits the actor.

    Args:
        config: of the run.
        tokenizer: the actor's.
        functions: Python objects by the value of --reward_fn that stands for them.

    Raises:
        ValueError: a tokenizer or function cannot be loaded, the critic cannot read the actor's
            tokens, or a reward model has no head that scores.
    """
    options = config.model

    def load(path: str, flag: str):
        return load_tokenizer(
            path,
            add_eot_token=options.add_eot_token,
            eot_token=options.eot_token,
            trust_remote_code=options.trust_remote_code,
            flag=flag,
        )

    critic_tokenizer = None
    if config.has_critic:
        critic_tokenizer = load(options.critic_model_name_or_path, "--critic_model_name_or_path")
        check_critic_tokenizer(tokenizer, critic_tokenizer, options.critic_model_name_or_path)
    models = {path: load(path, config.reward_flag) for path in config.reward_models}
    for path in models:
        check_reward_model(
            path, flag=config.reward_flag, trust_remote_code=options.trust_remote_code
        )
    given = functions or {}
    found = {name: given.get(name) or load_function(name) for name in options.reward_fn}
    return RewardPlan(config, tokenizer, critic_tokenizer, models, found)


def tokenizer_mismatch(actor: str, reward: str) -> str:
    """Return why step 3 will refuse a critic trained from model `reward` beside an actor `actor`.

    Returns:
        A message; "" if step 3 will accept it, or if a tokenizer cannot be loaded, which the step
        that needs it reports.
    """
    if actor == reward:
        return ""
    try:
        tokenizer, other = load_tokenizer(actor), load_tokenizer(reward)
    except ValueError:
        return ""
    ensure_unambiguous_pad(other)  # as step 2 does
    if same_tokens(tokenizer, other):
        return ""
    return (
        f"--reward-model {reward}: its tokenizer ({len(other)} tokens) is not that of "
        f"--actor-model {actor} ({len(tokenizer)} tokens), and in step 3 the critic starts from "
        "the reward model and reads the actor's tokens. Give a reward model of the actor's family, "
        "or the actor's own model."
    )
