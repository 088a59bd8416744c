"""Generation for a chat: one conversation at a time, with the answer streamed as it is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from dschat.models.tokenizer import eos_token_ids


@dataclass(frozen=True)
class Answer:
    """An answer of a model."""

    text: str  # without the end token and without the stop text
    num_tokens: int  # includes the end token
    ended: bool  # False: cut at max_new_tokens


@dataclass(frozen=True)
class Sampling:
    """The settings by which tokens are drawn."""

    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int = 0  # draw from this many likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens that have this probability together
    repetition_penalty: float = 1.0  # above 1, tokens that occurred become less likely
    seed: int | None = None  # None: continue the random stream


class ChatModel:
    """A causal language model and the settings by which it answers.

    Of the model's generation config only the end token ids are used.

    Args:
        model: the language model; it is put into evaluation mode, and its generation config is
            replaced.
        tokenizer: the model's tokenizer.
        sampling: the settings of answers that bring none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sampling: Sampling = Sampling(),
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.end_ids = eos_token_ids(model.generation_config, tokenizer)
        # generate() takes what a call leaves open from the model's generation config, which may ban
        # or force tokens.
        model.generation_config = GenerationConfig()
        self.sampling = sampling

    def max_conversation_tokens(self, limit: int, *, max_new_tokens: int) -> int:
        """Return the largest number of tokens that a conversation may have.

        This is `limit`, or less if the model's positions do not hold `limit` tokens and an answer.

        Raises:
            ValueError: the model has no positions besides those of an answer.
        """
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None:
            return limit
        if positions <= max_new_tokens:
            raise ValueError(
                f"--max_new_tokens {max_new_tokens}: the model has {positions} positions for "
                "conversation and answer together. Give a lower number."
            )
        return min(limit, positions - max_new_tokens)

    def answer(
        self,
        ids: list[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_texts: Sequence[str] = (),
        show: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Generate the answer to a conversation.

        Args:
            ids: token ids of the conversation up to where the answer begins.
            max_new_tokens: cut the answer after this many tokens.
            sampling: how tokens are drawn; None: as the model's own settings say.
            stop_texts: each ends the answer as an end token does, and is not part of the answer.
            show: called with each piece of the answer's text as it is made.
            stop: called after each token; returning True cuts the answer.
        """
        sampling = self.sampling if sampling is None else sampling
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        streamer = AnswerStreamer(self.tokenizer, stop_texts=stop_texts, show=show)
        criterion = _CallbackCriterion(lambda: streamer.stopped or stop())
        input_ids = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            sequences = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=self._generation_config(sampling, max_new_tokens),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([criterion]),
            )
        new_ids = sequences[0, len(ids) :].tolist()
        at_end_token = bool(new_ids) and new_ids[-1] in self.end_ids
        return Answer(
            text=streamer.text, num_tokens=len(new_ids), ended=streamer.stopped or at_end_token
        )

    def _generation_config(self, sampling: Sampling, max_new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or 1.0,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            num_beams=1,
            eos_token_id=list(self.end_ids),
            pad_token_id=self.tokenizer.pad_token_id,
        )


class AnswerStreamer(BaseStreamer):
    """A streamer that shows text which can no longer change.

    It holds back the bytes of an incomplete character, and text that may be the beginning of
    one of `stop_texts`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_texts: Sequence[str] = (),
        show: Callable[[str], None],
    ):
        self.tokenizer = tokenizer
        self.stop_texts = tuple(stop_texts)
        self.show = show
        self.text = ""  # everything shown so far
        self.stopped = False
        self._tokens: list[int] | None = None  # None until generate() has passed the prompt
        self._num_decoded = 0  # characters
        self._held = ""

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt in the first call, and the next token in each later one."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # else the last character is incomplete
            self.add(text[self._num_decoded :])
            self._num_decoded = len(text)

    def end(self) -> None:
        """Show the text that is still held back, after the last token."""
        text = self.tokenizer.decode(self._tokens or [], skip_special_tokens=True)
        self.add(text[self._num_decoded :], last=True)

    def add(self, text: str, *, last: bool = False) -> None:
        """Append a piece of the answer and show what is certain; `last` holds nothing back."""
        if self.stopped:
            return
        ready = self._held + text
        self._held = ""
        ends = [place for place in map(ready.find, self.stop_texts) if place >= 0]
        if ends:
            self.stopped = True
            ready = ready[: min(ends)]
        elif not last:
            num_held = max((_overlap(ready, text) for text in self.stop_texts), default=0)
            num_shown = len(ready) - num_held
            self._held = ready[num_shown:]
            ready = ready[:num_shown]
        if ready:
            self.text += ready
            self.show(ready)


def _overlap(text: str, stop_text: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop_text`."""
    for length in range(len(stop_text), 0, -1):
        if text.endswith(stop_text[:length]):
            return length
    return 0


class _CallbackCriterion(StoppingCriteria):
    """Ends generation at the first token after which `stopped` returns True."""

    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs
    ) -> torch.BoolTensor:
        return torch.full(
            input_ids.shape[:1], self.stopped(), dtype=torch.bool, device=input_ids.device
        )
