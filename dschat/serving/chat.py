"""The models to talk to, each with its prompt format, its limits and its settings."""

from collections.abc import Sequence

import torch

from dschat.config.chat import ChatConfig
from dschat.data.encoding import Encoder
from dschat.data.row import Row
from dschat.models.causal_lm import load_causal_lm
from dschat.models.inference_device import inference_placement
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer
from dschat.runtime.run_record import recorded_format
from dschat.serving.chat_model import Answer, ChatModel, Sampling
from dschat.serving.conversation import chat_format, fit_conversation, stop_texts


class Chat:
    """One model of a configuration with its prompt format and limits.

    Args:
        config: the flags of the chat program.
        path: the model; default --path.
        flag: the flag that `path` came from, for messages.

    Raises:
        ValueError: there is no such model, or it leaves no room for a conversation.
    """

    def __init__(self, config: ChatConfig, *, path: str = "", flag: str = "--path"):
        device, dtype = inference_placement(config.model.dtype)
        self.path = path or config.model.path
        trust = config.model.trust_remote_code
        self.tokenizer = load_tokenizer(
            self.path,
            add_eot_token=config.model.add_eot_token,
            eot_token=config.model.eot_token,
            trust_remote_code=trust,
            flag=flag,
        )
        model = load_causal_lm(
            self.path, dtype=dtype, tokenizer=self.tokenizer, trust_remote_code=trust, flag=flag
        )
        answers = config.answers
        sampling = Sampling(
            answers.temperature, answers.top_k, answers.top_p, answers.repetition_penalty
        )
        self.model = ChatModel(model.to(device), self.tokenizer, sampling=sampling)
        trained_on = recorded_format(self.path, answers.prompt_format)
        self.format = chat_format(trained_on, self.tokenizer)
        if self.format == "chat" and not self.tokenizer.chat_template:
            raise ValueError(
                f"--prompt_format chat: the tokenizer of {flag} {self.path} has no chat template. "
                "Give auto."
            )
        self.max_new_tokens = answers.max_new_tokens
        self.max_conversation_tokens = self.model.max_conversation_tokens(
            answers.max_prompt_seq_len, max_new_tokens=self.max_new_tokens
        )
        torch.manual_seed(answers.seed)

    @property
    def sampling(self) -> Sampling:
        """The sampling that the flags ask for."""
        return self.model.sampling

    def fit(self, messages: list[dict]) -> tuple[list[int], int]:
        """Encode a conversation; see ``fit_conversation``."""
        return fit_conversation(
            messages,
            self.tokenizer,
            prompt_format=self.format,
            max_tokens=self.max_conversation_tokens,
        )

    def answer(
        self, ids: list[int], *, max_new_tokens: int, ends: Sequence[str] = (), **options
    ) -> Answer:
        """Generate an answer, which any of `ends` ends, too; see ``ChatModel.answer``."""
        texts = (*stop_texts(self.format), *ends)
        return self.model.answer(ids, max_new_tokens=max_new_tokens, stop_texts=texts, **options)

    def as_turn(self, text: str) -> str:
        """Return an answer as the training steps read it in a conversation."""
        return text if self.format == "plain" else text.strip()


def load_chats(config: ChatConfig) -> dict[str, Chat]:
    """Load the models of --path or --models, by name."""
    named = config.model.named_paths()
    flag = "--models" if config.model.models else "--path"
    return {name: Chat(config, path=path, flag=flag) for name, path in named.items()}


class Scorer:
    """A reward model that scores answers.

    Args:
        config: the flags of the chat program; --reward_model names the model.

    Raises:
        ValueError: there is no such model, or it has no reward head.
    """

    def __init__(self, config: ChatConfig):
        path = config.model.reward_model
        trust = config.model.trust_remote_code
        flag = "--reward_model"
        self.device, dtype = inference_placement(config.model.dtype)
        self.tokenizer = load_tokenizer(
            path,
            add_eot_token=config.model.add_eot_token,
            eot_token=config.model.eot_token,
            trust_remote_code=trust,
            flag=flag,
        )
        model = load_reward_model(
            path,
            dtype=dtype,
            tokenizer=self.tokenizer,
            fresh_head=False,
            trust_remote_code=trust,
            flag=flag,
        )
        self.model = model.to(self.device).eval()
        self.format = chat_format(recorded_format(path, "auto"), self.tokenizer)
        self.encoder = Encoder(self.tokenizer, prompt_format=self.format)
        text_config = model.config.get_text_config()
        self.max_tokens = getattr(text_config, "max_position_embeddings", None)

    def score(self, messages: list[dict], answer: str, *, ended: bool = True) -> float | None:
        """Return the reward of an answer; None for an empty one.

        Args:
            messages: the conversation up to the answer. Its beginning is cut if the model's
                positions do not hold it.
            answer: the text of the answer.
            ended: False: the answer was cut, and no end token follows it.
        """
        if not answer.strip():
            return None
        prompt: str | list[dict] = messages
        if self.format == "plain":
            prompt = "".join(message["content"] for message in messages)
        row = Row(prompt, place="the conversation")
        ids = self.encoder.encode_answer(row, answer, ended=ended)
        if self.max_tokens:
            ids = ids[-self.max_tokens :]
        with torch.no_grad():
            values = self.model(
                input_ids=torch.tensor([ids], device=self.device), attention_mask=None
            )
        return float(values[0, -1])
