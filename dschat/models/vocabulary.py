"""Tokenizer and embedding: every id needs a row, and added tokens get new ones."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCABULARY_MULTIPLE = 8  # rows; tensor cores want multiples of 8


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, *, path: str, flag: str
) -> None:
    """Check that every id of `tokenizer` has a row in an embedding of `num_rows`, or will get one.

    Added tokens will: the embedding grows for them.

    Raises:
        ValueError: an id of the vocabulary has no row, as when the tokenizer is another model's.
    """
    added = tokenizer.get_added_vocab()
    outside = [
        (index, token)
        for token, index in tokenizer.get_vocab().items()
        if index >= num_rows and (token not in added or index >= len(tokenizer))
    ]
    if outside:
        index, token = max(outside)
        raise ValueError(
            f"{flag} {path!r}: its tokenizer has the token {token!r} with id {index}, and the "
            f"model's vocabulary ends with id {num_rows - 1} ({len(outside)} ids are outside). "
            "Copy the tokenizer files that belong to this model into its folder."
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the rows of the embedding, which ZeRO-3 may have partitioned."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def grow_vocabulary(model: PreTrainedModel, num_tokens: int) -> bool:
    """Grow the embedding (and an untied head) to at least `num_tokens` rows; never shrink it.

    The number of rows is rounded up to a multiple of 8. New rows are the mean of the old, which
    moves the output distribution least (Hewitt 2021, Initializing new word embeddings for
    pretrained language models).

    Returns:
        Whether the embedding had fewer rows.
    """
    old_rows = embedding_rows(model)
    if num_tokens <= old_rows:
        return False
    model.resize_token_embeddings(
        num_tokens, pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False
    )
    # Even under ZeRO-3 the new matrices are whole on every rank: transformers makes them outside of
    # zero.Init, and the engine partitions them later.
    head = model.get_output_embeddings()
    weights = [model.get_input_embeddings().weight]
    if head is not None:
        weights.append(head.weight)
    with torch.no_grad():
        for matrix in {id(w): w for w in weights}.values():  # tied ones once
            assert matrix.shape[0] >= num_tokens, "the resized embedding is partitioned"
            matrix[old_rows:] = matrix[:old_rows].float().mean(dim=0).to(matrix.dtype)
    return True
