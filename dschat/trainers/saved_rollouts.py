"""Training rollouts kept as JSON lines, which ``python -m dschat.rollouts`` shows."""

import json
from pathlib import Path

import torch

from dschat.algorithms.types import Experience
from dschat.runtime import dist
from dschat.runtime.files import write_text
from dschat.runtime.log import logger
from dschat.trainers.rollout import SampledAnswers

FOLDER = "rollouts"


class SavedRollouts:
    """Write the answers of every so many rollouts to rollouts/rollout_N.jsonl."""

    def __init__(
        self, output_dir: str | None, tokenizer, *, interval: int, has_reference: bool = True
    ):
        """Set the folder.

        Args:
            output_dir: the run's folder; None: write nothing.
            tokenizer: the actor's.
            interval: write every so many rollouts; 0: never.
            has_reference: whether the logprobs of a reference model are known.
        """
        self.folder = None if output_dir is None else Path(output_dir) / FOLDER
        self.tokenizer = tokenizer
        self.interval = interval
        self.has_reference = has_reference

    def save(self, rollout: int, experience: Experience, answers: list[SampledAnswers]) -> None:
        """Write a rollout if it is due. Every rank must call it.

        Args:
            rollout: its number, from 1.
            experience: of this rank, as it is learned from.
            answers: the batches that `experience` was computed from, in the same order.
        """
        if self.folder is None or not self.interval or rollout % self.interval:
            return
        rows = self.rows(experience, answers)
        if not dist.is_main():
            return
        path = self.folder / f"rollout_{rollout:06d}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        try:
            write_text(path, "".join(lines))
        except OSError as error:  # a full disk must not end the run
            logger.warning(f"{path}: {error.strerror}; this rollout is not kept")

    def delete_after(self, rollout: int) -> None:
        """Delete the files of later rollouts, which an earlier run in this folder has written."""
        if self.folder is not None and dist.is_main():
            for file in self.folder.glob("rollout_*.jsonl"):
                if int(file.stem.removeprefix("rollout_")) > rollout:
                    file.unlink()

    def rows(self, experience: Experience, answers: list[SampledAnswers]) -> list[dict]:
        """Return one row for each answer of all ranks, in the order of ranks.

        Every rank must call it. See ``save`` for the arguments.
        """
        ended = torch.cat([batch.ended for batch in answers])
        mask = experience.response_mask
        num_prompt = experience.input_ids.shape[1] - mask.shape[1]
        numbers = {
            "score": experience.scores,
            "reward": _row_sums(experience.rewards, mask),
            "advantage": _row_sums(experience.advantages, mask),
            "logprob": _row_sums(experience.logprobs, mask),
            "ref_logprob": _row_sums(experience.ref_logprobs, mask),
            "ended": ended,
        }
        if not self.has_reference:
            del numbers["ref_logprob"]
        columns = (
            experience.input_ids[:, :num_prompt],
            experience.attention_mask[:, :num_prompt],
            experience.input_ids[:, num_prompt:],
            mask.long(),
            torch.stack([column.double() for column in numbers.values()], dim=-1),
        )
        # Row i of rank r is gathered to i * world size + r.
        prompts, prompt_masks, tokens, masks, found = (
            dist.gather_rows(column).cpu() for column in columns
        )
        ranks = dist.world_size()
        order = [i for rank in range(ranks) for i in range(rank, len(found), ranks)]
        return [
            {
                "prompt": self._text(prompts[i][prompt_masks[i].bool()]),
                "answer": self._text(tokens[i][masks[i].bool()]),
                "length": int(masks[i].sum()),
                **dict(zip(numbers, found[i].tolist())),
                "ended": bool(found[i, -1]),
            }
            for i in order
        ]

    def _text(self, tokens: torch.Tensor) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _row_sums(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum `values` [B, R] under `mask` for each row, as [B]."""
    return torch.where(mask, values, torch.zeros_like(values)).sum(-1)
