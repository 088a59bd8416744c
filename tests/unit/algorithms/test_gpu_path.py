"""The way of a GPU through the logprobs, on a CPU: compiled functions run uncompiled here."""

import pytest
import torch

from dschat.algorithms import logprobs
from dschat.algorithms.logprobs import token_logprobs


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU."""

    is_cuda = True


@pytest.fixture
def compiled(monkeypatch):
    """Return the names of the functions that the code compiles, instead of compiling them."""
    names = []

    def note(function):
        names.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", note)
    for cached in (logprobs._compiled, logprobs._can_compile):
        cached.cache_clear()
    yield names
    for cached in (logprobs._compiled, logprobs._can_compile):
        cached.cache_clear()


def results(logits: torch.Tensor) -> list[torch.Tensor]:
    """Return logprobs, entropy and the gradient of logits [2, 3, 5]."""
    leaf = logits.clone().requires_grad_(True)
    tokens = torch.tensor([[0, 1, 2], [4, 3, 2]])
    found, entropy = token_logprobs(leaf, tokens, temperature=0.7)
    (found.sum() + 0.3 * entropy.square().sum()).backward()
    return [part.detach().as_subclass(torch.Tensor) for part in (found, entropy, leaf.grad)]


@pytest.mark.parametrize("has_triton", [True, False])
def test_a_gpu_with_a_compiler_takes_the_fused_pass_with_the_same_results(
    has_triton, compiled, monkeypatch
):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(logprobs, "has_triton", lambda: has_triton)
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(results(logits.as_subclass(OnGPU)), results(logits)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert compiled == (["_fused_forward", "_fused_backward"] if has_triton else [])


@pytest.mark.parametrize("found, possible", [("gcc", True), ("cc", True), (None, False)])
def test_a_compiler_is_found_by_its_usual_names(found, possible, compiled, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(logprobs, "has_triton", lambda: True)
    monkeypatch.setattr(logprobs.shutil, "which", lambda name: name if name == found else None)
    assert logprobs._can_compile() is possible
