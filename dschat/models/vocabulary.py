"""Tokenizer and embedding: that every id has a row, and rows for tokens that were added."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCABULARY_MULTIPLE = 8  # rows; tensor cores want matrix sizes in eights


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, *, path: str, flag: str
) -> None:
    """Check that every id of `tokenizer` has a row in an embedding of `num_rows`, or gets one: tokens that were added
    make it grow.

    Raises:
        ValueError: an id of the vocabulary itself has no row, as where the tokenizer is that of another model.
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
            f"{flag} {path!r}: its tokenizer has the token {token!r} with id {index}, and the model's vocabulary ends with id "
            f"{num_rows - 1} ({len(outside)} ids are outside). Copy the tokenizer files that belong to this model into its "
            "folder."
        )


def grow_vocabulary(model: PreTrainedModel, num_tokens: int) -> bool:
    """Grow the embedding (and an untied head) to `num_tokens` rows, and return whether it had fewer,
    rounded up to a multiple of 8. New rows are the mean of the old, which moves the output distribution least
    (Hewitt 2021, Initializing new word embeddings for pretrained language models).
    """
    weight = model.get_input_embeddings().weight
    old_rows = getattr(weight, "ds_shape", weight.shape)[0]
    if num_tokens <= old_rows:
        return False
    model.resize_token_embeddings(
        num_tokens, pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False
    )
    # Under ZeRO-3 too the new matrices are whole on every rank: transformers makes them outside of zero.Init, and
    # the engine partitions them later.
    head = model.get_output_embeddings()
    weights = [model.get_input_embeddings().weight] + ([head.weight] if head is not None else [])
    with torch.no_grad():
        for matrix in {id(w): w for w in weights}.values():
            assert matrix.shape[0] >= num_tokens, "the resized embedding is partitioned"
            matrix[old_rows:] = matrix[:old_rows].float().mean(dim=0).to(matrix.dtype)
    return True
