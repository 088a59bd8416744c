"""A model that answers one conversation at a time, and shows its answer as it comes."""

from collections.abc import Callable
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

    text: str  # without the end token, and without what it was stopped by
    num_tokens: int  # the end token counts
    ended: bool  # False: cut at max_new_tokens


class ChatModel:
    """A causal language model with the settings by which it answers; none of its own generation settings counts but
    the ids that end an answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
    ):
        """
        Args:
            temperature: of the draws; 0: the likeliest token.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.end_ids = eos_token_ids(model.generation_config, tokenizer)
        # transformers fills what a call leaves open from the model's own settings, which may ban or force tokens.
        model.generation_config = GenerationConfig()
        self.settings = dict(
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            num_beams=1,
            eos_token_id=list(self.end_ids),
            pad_token_id=tokenizer.pad_token_id,
        )

    def room(self, limit: int, *, max_new_tokens: int) -> int:
        """The most tokens of a conversation: `limit`, or what the model's positions leave beside an answer.

        Raises:
            ValueError: they leave none.
        """
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None:
            return limit
        if positions <= max_new_tokens:
            raise ValueError(
                f"--max_new_tokens {max_new_tokens}: the model has {positions} positions for conversation and answer; "
                "give less."
            )
        return min(limit, positions - max_new_tokens)

    def answer(
        self,
        ids: list[int],
        *,
        max_new_tokens: int,
        stop_text: str | None = None,
        show: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """The answer to a conversation.

        Args:
            ids: of the conversation, from its beginning to where the answer begins.
            stop_text: a text that ends the answer as an end token does, and is no part of it.
            show: gets the pieces of the answer's text, as they come.
            stop: asked at each token whether the answer is to be cut short there.
        """
        shown = ShownText(self.tokenizer, stop_text=stop_text, show=show)
        input_ids = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            sequence = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=GenerationConfig(max_new_tokens=max_new_tokens, **self.settings),
                streamer=shown,
                stopping_criteria=StoppingCriteriaList([_Stopped(lambda: shown.stopped or stop())]),
            )[0]
        new = sequence[len(ids) :].tolist()
        return Answer(
            shown.text, len(new), shown.stopped or (bool(new) and new[-1] in self.end_ids)
        )


class ShownText(BaseStreamer):
    """Tokens to pieces of text. Held back is what may still change: the bytes of half a character, and what might be the
    beginning of `stop_text`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_text: str | None,
        show: Callable[[str], None],
    ):
        self.tokenizer = tokenizer
        self.stop_text = stop_text
        self.show = show
        self.text = ""  # all that was shown
        self.stopped = False
        self._tokens: list[int] | None = None  # None until the prompt went by
        self._decoded = 0  # characters
        self._held = ""

    def put(self, value: torch.Tensor) -> None:
        """The prompt, and then the next token each time, from generate."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self.take(text[self._decoded :])
            self._decoded = len(text)

    def end(self) -> None:
        """No more tokens."""
        self.take(
            self.tokenizer.decode(self._tokens or [], skip_special_tokens=True)[self._decoded :],
            last=True,
        )

    def take(self, text: str, *, last: bool = False) -> None:
        """The next piece of the text."""
        if self.stopped:
            return
        ready, self._held = self._held + text, ""
        if self.stop_text:
            ready, mark, _ = ready.partition(self.stop_text)
            self.stopped = bool(mark)
            if not mark and not last:
                held = next(
                    n
                    for n in range(len(self.stop_text), -1, -1)
                    if ready.endswith(self.stop_text[:n])
                )
                ready, self._held = ready[: len(ready) - held], ready[len(ready) - held :]
        if ready:
            self.text += ready
            self.show(ready)


class _Stopped(StoppingCriteria):
    """Ends generation at the first token after which `stopped` returns True."""

    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs
    ) -> torch.BoolTensor:
        return torch.full(
            input_ids.shape[:1], self.stopped(), dtype=torch.bool, device=input_ids.device
        )
