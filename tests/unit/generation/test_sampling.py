import torch

from dschat.generation.sampling import response_mask


def test_response_mask_ends_with_the_first_eos_and_knows_every_eos_id():
    tokens = torch.tensor([[5, 2, 5, 2], [7, 2, 2, 2], [5, 6, 5, 6], [5, 6, 5, 7]])
    assert response_mask(tokens, (2, 7)).tolist() == [
        [True, True, False, False],
        [True, False, False, False],
        [True, True, True, True],
        [True, True, True, True],
    ]
