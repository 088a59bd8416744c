"""Evaluation of the policy: scores, exact KL and lengths of answers to held-out prompts."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from dschat.runtime import dist
from dschat.runtime.log import logger
from dschat.tracking.progress import ReportedBatches, reported_work
from dschat.trainers.rollout import exact_kl, generate, sampling_config

NUM_SAMPLES = 16  # answers of an evaluation that loggers show


@dataclass(frozen=True)
class PolicyEvaluation:
    """One sampled answer to each of N held-out prompts."""

    scores: torch.Tensor  # [N] of the reward, before division by its spread
    # [N] exact KL(policy || reference) summed over the answer, nats; None without a reference
    kl: torch.Tensor | None
    lengths: torch.Tensor  # [N] int64, tokens with the closing EOS
    ended: torch.Tensor  # [N] bool
    tokens: torch.Tensor  # [N, R] int64; arbitrary after lengths

    def summary(self) -> dict[str, float]:
        """Return means, the scores' standard deviation, and the share of answers with an EOS."""
        kl = {} if self.kl is None else {"eval/kl": self.kl.mean().item()}
        return {
            "eval/score": self.scores.mean().item(),
            "eval/score_sd": self.scores.std().item(),
            **kl,
            "eval/length": self.lengths.double().mean().item(),
            "eval/eos_rate": self.ended.double().mean().item(),
        }


class PolicyEvaluator:
    """Samples, scores and saves one answer to each held-out prompt, always with the same seed."""

    def __init__(
        self,
        engines,
        rewards,
        loader,
        tokenizer,
        *,
        max_new_tokens: int,
        eos_token_ids: tuple[int, ...],
        seed: int,
        output_dir: str | None,
        log_interval_s: float = 5.0,
    ):
        """Set the models, the prompts and the sampling.

        Args:
            engines: actor and reference engines, and the generator (``DeepSpeedRLHFEngine``).
            rewards: SampledAnswers to scores [B].
            loader: PromptBatches in the data set's order.
            tokenizer: the actor's.
            max_new_tokens: length limit of an answer, in tokens.
            eos_token_ids: the ids that end an answer.
            seed: of the samples; rank r draws from seed + r.
            output_dir: answers are written to evaluation/rollout_N.jsonl in it; None: not written.
            log_interval_s: seconds between progress lines.
        """
        self.engines = engines
        self.rewards = rewards
        self.loader = loader
        self.tokenizer = tokenizer
        self.seed = seed
        self.output_dir = output_dir
        self.log_interval_s = log_interval_s
        self.samples: list[dict] = []  # the first rows of the last evaluation, on rank 0
        self.generation = sampling_config(
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            pad_token_id=tokenizer.pad_token_id,
        )

    def evaluate(self, rollout: int) -> dict[str, float]:
        """Return metrics after `rollout` rollouts (0: before training), over all ranks."""
        if rollout == 0:
            self.delete_answers_after(-1)
        result = self._sample_and_score()
        values = result.summary()
        shown = "  ".join(f"{key[5:]} {value:.4g}" for key, value in values.items())
        logger.info(f"PPO  evaluation, rollout {rollout}: {shown}")
        if dist.is_main():
            rows = self._rows(result)
            self.samples = rows[:NUM_SAMPLES]
            if self.output_dir is not None:
                folder = Path(self.output_dir) / "evaluation"
                _write_rows(rows, folder / f"rollout_{rollout:06d}.jsonl")
        return values

    def delete_answers_after(self, rollout: int) -> None:
        """Delete the files of later rollouts, which an earlier run in this folder has written."""
        if self.output_dir is not None and dist.is_main():
            for file in (Path(self.output_dir) / "evaluation").glob("rollout_*.jsonl"):
                if int(file.stem.removeprefix("rollout_")) > rollout:
                    file.unlink()

    def _sample_and_score(self) -> PolicyEvaluation:
        engines = self.engines
        device = engines.actor.device
        engines.eval()
        parts = []
        with _seeded(self.seed + dist.rank(), device):
            batches = [prompts.to(device) for prompts in self.loader]
            with reported_work("PPO  evaluation", interval_s=self.log_interval_s):
                sampled = generate(engines.generator, batches, generation=self.generation)
            engines.generator.end_rollout()
            scored = ReportedBatches(
                sampled, "PPO  evaluation, scoring", interval_s=self.log_interval_s
            )
            for answers in scored:
                unused = self.generation.max_new_tokens - answers.tokens.shape[1]
                columns = (
                    self.rewards(answers),
                    self._kl(answers),
                    answers.response_mask.sum(-1),
                    answers.ended.long(),
                    torch.nn.functional.pad(answers.tokens, (0, unused)),
                )
                parts.append(columns)
        num_rows = len(self.loader.dataset)
        scores, kl, lengths, ended, tokens = (
            dist.gather_rows(torch.cat(column), num_rows).cpu() for column in zip(*parts)
        )
        if engines.ref is None:
            kl = None
        return PolicyEvaluation(scores, kl, lengths, ended.bool(), tokens)

    def _kl(self, answers) -> torch.Tensor:
        """Return the exact KL of each answer [B], zeros without a reference."""
        if self.engines.ref is None:
            return torch.zeros(len(answers.ended), device=answers.ended.device)
        return exact_kl(self.engines, answers)

    def _rows(self, result: PolicyEvaluation) -> list[dict]:
        """Return one row for each prompt, as it is written to the file."""
        found = []
        for i, length in enumerate(result.lengths.tolist()):
            prompt = self.loader.dataset[i]["input_ids"]
            answer = result.tokens[i, :length]
            row = {
                "prompt": self.tokenizer.decode(prompt, skip_special_tokens=True),
                "answer": self.tokenizer.decode(answer, skip_special_tokens=True),
                "score": result.scores[i].item(),
                **({} if result.kl is None else {"kl": result.kl[i].item()}),
                "length": length,
                "ended": bool(result.ended[i]),
            }
            found.append(row)
        return found


def _write_rows(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device):
    """Seed torch within the block, and restore its random state afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
