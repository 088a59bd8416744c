"""The check in front of the decode kernel."""

import pytest
import torch

from dschat.generation.kernels import attention

SHAPES = dict(
    query=(2, 4, 1, 16),
    key=(3, 2, 20, 16),
    value=(3, 2, 20, 16),
    new_key=(2, 2, 1, 16),
    new_value=(2, 2, 1, 16),
)


def refuse(terms=None, **changed) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in {**SHAPES, **changed}.items()}
    attention.refuse_unfit(*tensors.values(), terms=terms or {})


def test_grouped_queries_fit():
    refuse()
    refuse(terms=dict(softcap=None, is_causal=True))


@pytest.mark.parametrize(
    "changed",
    [
        dict(query=(2, 4, 1, 24)),
        dict(value=(3, 2, 20, 8)),
        dict(new_key=(2, 1, 1, 16), new_value=(2, 1, 1, 8)),  # latent attention
        dict(new_value=(2, 2, 1, 8)),
        dict(key=(3, 3, 20, 16), value=(3, 3, 20, 16)),
        dict(query=(2, 4, 2, 16)),
        dict(value=(3, 2, 18, 16)),
        dict(query=(4, 4, 1, 16)),
    ],
)
def test_other_shapes_are_refused_before_a_launch(changed):
    with pytest.raises(attention.UnfitAttention, match="other shapes.*query"):
        refuse(**changed)


@pytest.mark.parametrize("term", attention.UNKNOWN_TERMS)
def test_terms_that_the_kernel_does_not_compute_are_refused(term):
    with pytest.raises(attention.UnfitAttention, match=term):
        refuse(terms={term: 1.0})
