"""One fixed rollout, and the PPO gradients of it by plain transformers and autograd."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

PROMPT_LENGTHS = (9, 4, 7, 3, 9, 6, 5, 8)
ANSWER_LENGTHS = (7, 1, 3, 7, 5, 2, 6, 4)
ENDED = (False, True, True, True, True, True, False, True)  # by </s>; two reached the limit
PAD, BOS, EOS = 0, 1, 2  # of the miniature tokenizers
CLIP = 0.2
PTX_COEF = 0.5
ENTROPY_COEF = 0.3
FAMILIES = ("llama", "gpt2", "opt")  # positions: rotary, learned, and learned from 2 on


def write_experience(stock: Path) -> None:
    """Write experience-FAMILY.safetensors (the fields of Experience, 8 rows) and ptx.safetensors.

    The old logprobs and values are near those of sft/FAMILY and reward/FAMILY, some outside the
    clip.
    """
    for family in FAMILIES:
        tensors = {
            name: tensor.contiguous() for name, tensor in fixed_experience(stock, family).items()
        }
        save_file(tensors, stock / f"experience-{family}.safetensors")
    # Two batches of text of two rows; the second row of each is shorter.
    texts = torch.randint(3, 259, (2, 2, 12), generator=torch.Generator().manual_seed(6))
    save_file({"texts": texts}, stock / "ptx.safetensors")


def fixed_experience(stock: Path, family: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    num_prompt, num_answer = max(PROMPT_LENGTHS), max(ANSWER_LENGTHS)
    shape = (len(PROMPT_LENGTHS), num_answer)
    ids = torch.full((shape[0], num_prompt + num_answer), PAD)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer, ended) in enumerate(zip(PROMPT_LENGTHS, ANSWER_LENGTHS, ENDED)):
        where = slice(num_prompt - prompt, num_prompt + answer)
        ids[row, where] = torch.randint(3, 259, (prompt + answer,), generator=draw)
        ids[row, num_prompt - prompt] = BOS
        if ended:
            ids[row, num_prompt + answer - 1] = EOS
        mask[row, where] = 1
    live = mask[:, num_prompt:].bool()

    def noise(scale: float) -> torch.Tensor:
        return torch.where(live, scale * torch.randn(shape, generator=draw), torch.zeros(shape))

    with torch.no_grad():
        logprobs = plain_logprobs(plain_actor(stock, family), ids, mask, num_answer)
        values = plain_values(plain_critic(stock, family), ids, mask, num_answer)
    old = torch.where(live, logprobs, torch.zeros(shape))
    old_values = torch.where(live, values, torch.zeros(shape)) + noise(0.3)
    advantages = noise(1.0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "response_mask": live,
        "logprobs": old + noise(0.2),
        "ref_logprobs": old + noise(0.2),
        "values": old_values,
        "rewards": noise(1.0),
        "advantages": advantages,
        "returns": old_values + noise(1.0),
        "scores": torch.randn(shape[0], generator=draw),
    }


def ptx_mask(texts: torch.Tensor) -> torch.Tensor:
    """Return [2, T]: True for the tokens of a batch of texts that count."""
    mask = torch.ones_like(texts)
    mask[1, 9:] = 0
    return mask


def plain_actor(stock: Path, family: str):
    return AutoModelForCausalLM.from_pretrained(stock / "sft" / family, dtype=torch.float32)


def plain_critic(stock: Path, family: str):
    return AutoModelForSequenceClassification.from_pretrained(
        stock / "reward" / family, dtype=torch.float32
    )


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def plain_logprobs(model, ids, mask, num_answer: int) -> torch.Tensor:
    """Return [B, R] logprobs of the answer tokens."""
    return plain_logprobs_and_entropy(model, ids, mask, num_answer)[0]


def plain_logprobs_and_entropy(
    model, ids, mask, num_answer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logprobs and entropies of the answer tokens, [B, R] each."""
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
    logprobs = logits.log_softmax(-1)[:, -num_answer - 1 : -1]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, ids[:, -num_answer:, None]).squeeze(-1), entropy


def plain_values(model, ids, mask, num_answer: int) -> torch.Tensor:
    """Return [B, R] values of the state before each answer token."""
    hidden = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask)
    ).last_hidden_state
    return model.score(hidden).squeeze(-1)[:, -num_answer - 1 : -1]


def reference_gradients(
    stock: Path, family: str, experience: dict, *, texts: torch.Tensor | tuple = ()
) -> dict[str, dict]:
    """Return the gradients of actor and critic, by name.

    The losses of the whole rollout are divided by its number of tokens. The actor's has an entropy
    bonus of weight ENTROPY_COEF.

    Args:
        texts: [N, 2, T], batches whose mean loss joins the actor's with weight PTX_COEF.
    """
    e = experience
    live = experience["response_mask"]
    actor = plain_actor(stock, family)
    critic = plain_critic(stock, family)
    num_answer = live.shape[1]
    logprobs, entropy = plain_logprobs_and_entropy(
        actor, e["input_ids"], e["attention_mask"], num_answer
    )
    ratio = (logprobs - e["logprobs"]).exp()
    gain = torch.minimum(ratio * e["advantages"], ratio.clamp(1 - CLIP, 1 + CLIP) * e["advantages"])
    loss = -(gain + ENTROPY_COEF * entropy)[live].sum() / live.sum()
    for batch in texts:
        labels = torch.where(ptx_mask(batch) == 1, batch, torch.full_like(batch, -100))
        out = actor(input_ids=batch, attention_mask=ptx_mask(batch), labels=labels)
        loss = loss + PTX_COEF * out.loss / len(texts)
    loss.backward()
    values = plain_values(critic, e["input_ids"], e["attention_mask"], num_answer)
    near = e["values"] + (values - e["values"]).clamp(-CLIP, CLIP)
    errors = torch.maximum((values - e["returns"]) ** 2, (near - e["returns"]) ** 2)
    (0.5 * errors[live].sum() / live.sum()).backward()
    return {"actor": _gradients(actor), "critic": _gradients(critic)}


def _gradients(model) -> dict[str, torch.Tensor]:
    return {
        name: p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in model.named_parameters()
    }
