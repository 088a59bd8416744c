"""From the options to rewards: everything that can be checked is checked before a model loads."""

from collections.abc import Callable
from dataclasses import dataclass

from dschat.config.ppo import PPOConfig
from dschat.models.tokenizer import ensure_unambiguous_pad, load_tokenizer
from dschat.runtime.log import logger
from dschat.trainers.rewards import (
    FunctionReward,
    ModelReward,
    RetokenisedReward,
    Reward,
    WeightedRewards,
    check_critic_tokenizer,
    load_function,
    reads_alike,
    same_tokens,
)


@dataclass
class RewardPlan:
    """The rewards, and the tokens that the critic reads. The models load at the first ``build``."""

    config: PPOConfig
    tokenizer: object  # the actor's
    critic_tokenizer: object | None  # None without a critic
    model_tokenizers: dict[str, object]  # path of each reward model -> its tokenizer
    functions: dict[str, Callable]
    _rewards: list[Reward] | None = None

    def token_readers(self) -> list[str]:
        """The reward models that read the actor's tokens as they are."""
        return [path for path in self.model_tokenizers if self._reads_tokens(path)]

    def _reads_tokens(self, path: str) -> bool:
        other, model = self.model_tokenizers[path], self.config.model
        if not model.reward_model_name_or_path:
            # The critic's start is not asked for its template: it has to read the actor's tokens anyway.
            return same_tokens(self.tokenizer, other)
        formats = dict(
            prompt_format=self.config.data.prompt_format,
            reward_prompt_format=model.reward_prompt_format,
        )
        return reads_alike(self.tokenizer, other, **formats)

    def build(self, engines, dataset) -> WeightedRewards:
        """The rewards for answers to the prompts of `dataset`. Every process must call it."""
        if self._rewards is None:
            self._rewards = [self._model_reward(engines, path) for path in self.model_tokenizers]
            self._rewards += [
                FunctionReward(function, name) for name, function in self.functions.items()
            ]
            for reward in self._rewards:
                logger.info(f"reward: {reward.name} ({type(reward).__name__})")
        return WeightedRewards(
            self._rewards, self.config.model.reward_weights, dataset, self.tokenizer
        )

    def _model_reward(self, engines, path: str) -> Reward:
        tokenizer = self.model_tokenizers[path]
        named = bool(self.config.model.reward_model_name_or_path)
        flag = "--reward_model_name_or_path" if named else "--critic_model_name_or_path"
        engine = engines.add_reward(path, flag=flag, tokenizer=tokenizer)
        if self._reads_tokens(path):
            return ModelReward(engine, path)
        logger.info(
            f"{path} has a tokenizer, template or format of its own: answers are decoded and tokenised again"
        )
        return RetokenisedReward(
            engine,
            path,
            tokenizer,
            prompt_format=self.config.model.reward_prompt_format,
            max_tokens=getattr(engine.module.model.config, "max_position_embeddings", None),
        )


def plan_rewards(config: PPOConfig, tokenizer) -> RewardPlan:
    """Load the tokenizers and functions of the rewards, and see that critic and actor fit together.

    Args:
        tokenizer: the actor's.

    Raises:
        ValueError: a tokenizer or function that cannot be loaded, or a critic that cannot read the actor's tokens.
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
    models = {path: load(path, "--reward_model_name_or_path") for path in config.reward_models}
    functions = {name: load_function(name) for name in options.reward_fn}
    return RewardPlan(config, tokenizer, critic_tokenizer, models, functions)


def unlike_tokens(actor: str, reward: str) -> str:
    """Return why step 3 will refuse a critic trained from the model `reward` for an actor from `actor`.

    "" where it will not, or where a tokenizer cannot be loaded: the steps say why.
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
        f"--reward-model {reward}: its tokenizer ({len(other)} tokens) is not that of --actor-model {actor} ({len(tokenizer)} "
        "tokens), and in step 3 the critic starts from the reward model and reads the actor's tokens. Give a reward model of "
        "the actor's family, or the actor's own model."
    )
