"""A conversation to the ids that the model reads, by the same form as the rows of the steps; and requests by JSON."""

from transformers import PreTrainedTokenizerBase

from dschat.data.encoding import Encoder
from dschat.data.row import Row
from dschat.data.templates import HUMAN


def chat_format(prompt_format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Resolve "auto" for a conversation: "chat" if the tokenizer has a template, else "human_assistant"."""
    if prompt_format != "auto":
        return prompt_format
    return "chat" if tokenizer.chat_template else "human_assistant"


def stop_text(prompt_format: str) -> str | None:
    """The text by which a model that has not learned to end would begin the user's next turn; None: an id alone ends."""
    return HUMAN if prompt_format == "human_assistant" else None


def fit_conversation(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, *, prompt_format: str, max_tokens: int
) -> tuple[list[int], int]:
    """The ids of a conversation up to where its answer begins, and how many of its oldest messages were left out.

    Whole turns are left out until the rest has at most `max_tokens` ids; a system message in front stays.

    Args:
        messages: of {"role", "content"}; the last is the user's.
        prompt_format: "chat", "human_assistant" or "plain" (the texts joined as they stand).

    Raises:
        ValueError: the last message alone is too long, is empty, or the chat template refuses the conversation.
    """
    encoder = Encoder(tokenizer, prompt_format=prompt_format)
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    # Each turn begins with the user's message.
    begins = [i for i, message in enumerate(turns) if i == 0 or message["role"] == "user"]
    for begin in begins:
        kept = [*system, *turns[begin:]]
        plain = prompt_format == "plain"
        row = Row(
            "".join(message["content"] for message in kept) if plain else kept,
            place="the conversation",
        )
        ids = encoder.encode(row).prompt
        if not ids:
            raise ValueError("the message has no tokens; write at least one word.")
        if len(ids) <= max_tokens:
            return ids, begin
    raise ValueError(
        f"the last message alone makes {len(ids)} tokens, and there is room for {max_tokens}: shorten it, raise "
        "--max_prompt_seq_len, or lower --max_new_tokens where the model's positions are the limit."
    )
