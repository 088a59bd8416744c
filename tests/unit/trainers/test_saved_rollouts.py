"""Rollouts that are kept as JSON lines, with values computed by hand."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from dschat.algorithms.types import Experience, PromptBatch
from dschat.runtime import dist
from dschat.tracking.callbacks import Callbacks
from dschat.tracking.metrics import MetricsWriter
from dschat.trainers import ppo_run
from dschat.trainers.rollout import SampledAnswers
from dschat.trainers.saved_rollouts import SavedRollouts

PAD, EOS = 0, 1


class Letters:
    """A tokenizer whose token 10 is "a", 11 is "b", and so on."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(87 + int(i)) for i in ids if int(i) not in (PAD, EOS))


def rollout() -> tuple[Experience, list[SampledAnswers]]:
    """Return two rows: "ab" -> "c" with an end, and "c" -> "def", which is truncated."""
    ids = torch.tensor([[10, 11, 12, EOS, PAD], [PAD, 12, 13, 14, 15]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    attention = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    ended = torch.tensor([True, False])
    nan = float("nan")  # positions after an answer must not count
    experience = Experience(
        input_ids=ids,
        attention_mask=attention,
        response_mask=mask,
        loss_mask=mask & ended[:, None],
        importance=torch.ones(2, 3),
        logprobs=torch.tensor([[-1.0, -0.5, nan], [-1.0, -2.0, -3.0]]),
        ref_logprobs=torch.tensor([[-2.0, -0.5, nan], [-1.0, -2.5, -3.0]]),
        values=torch.zeros(2, 3),
        rewards=torch.tensor([[0.0, 0.75, nan], [0.25, 0.25, -1.0]]),
        advantages=torch.tensor([[1.0, 2.0, nan], [-1.0, -1.0, 0.5]]),
        returns=torch.zeros(2, 3),
        scores=torch.tensor([3.0, -2.0]),
    )
    prompts = PromptBatch(ids[:, :2], attention[:, :2], torch.tensor([0, 1]))
    answers = [
        SampledAnswers(
            prompts=prompts.rows(torch.tensor([i])),
            input_ids=ids[i : i + 1],
            attention_mask=attention[i : i + 1],
            response_mask=mask[i : i + 1],
            ended=ended[i : i + 1],
        )
        for i in range(2)
    ]
    return experience, answers


ROWS = [
    {
        "prompt": "ab",
        "answer": "c",
        "length": 2,
        "score": 3.0,
        "reward": 0.75,
        "advantage": 3.0,
        "logprob": -1.5,
        "ref_logprob": -2.5,
        "ended": True,
    },
    {
        "prompt": "c",
        "answer": "def",
        "length": 3,
        "score": -2.0,
        "reward": -0.5,
        "advantage": -1.5,
        "logprob": -6.0,
        "ref_logprob": -6.5,
        "ended": False,
    },
]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_has_the_texts_and_the_sums_of_an_answer(tmp_path):
    SavedRollouts(str(tmp_path), Letters(), interval=1).save(12, *rollout())
    assert lines(tmp_path / "rollouts" / "rollout_000012.jsonl") == ROWS


def test_a_run_without_reference_has_no_logprob_of_it(tmp_path):
    saved = SavedRollouts(str(tmp_path), Letters(), interval=1, has_reference=False)
    saved.save(1, *rollout())
    expected = [{key: row[key] for key in row if key != "ref_logprob"} for row in ROWS]
    assert lines(tmp_path / "rollouts" / "rollout_000001.jsonl") == expected


@pytest.mark.parametrize(("interval", "found"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4])])
def test_every_so_many_rollouts_are_kept(tmp_path, interval, found):
    saved = SavedRollouts(str(tmp_path), Letters(), interval=interval)
    for number in range(1, 6):
        saved.save(number, *rollout())
    names = sorted(path.name for path in tmp_path.glob("rollouts/*"))
    assert names == [f"rollout_{number:06d}.jsonl" for number in found]
    saved.delete_after(2)
    left = sorted(path.name for path in tmp_path.glob("rollouts/*"))
    assert left == [name for name in names if name <= "rollout_000002.jsonl"]


def test_rows_of_all_ranks_are_in_the_order_of_ranks(tmp_path, monkeypatch):
    # Two ranks with the same rows: row i of rank r is gathered to 2 * i + r.
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather_rows", lambda rows: rows.repeat_interleave(2, 0))
    SavedRollouts(str(tmp_path), Letters(), interval=1).save(1, *rollout())
    assert lines(tmp_path / "rollouts" / "rollout_000001.jsonl") == ROWS + ROWS


def test_other_ranks_write_and_delete_no_file(tmp_path, monkeypatch):
    saved = SavedRollouts(str(tmp_path), Letters(), interval=1)
    saved.save(1, *rollout())
    monkeypatch.setattr(dist, "is_main", lambda: False)
    saved.save(2, *rollout())
    saved.delete_after(0)
    assert [path.name for path in tmp_path.glob("rollouts/*")] == ["rollout_000001.jsonl"]


def test_a_run_without_folder_keeps_none():
    saved = SavedRollouts(None, Letters(), interval=1)
    saved.save(1, *rollout())
    saved.delete_after(0)


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "rollouts").write_text("a file in the way")
    SavedRollouts(str(tmp_path), Letters(), interval=1).save(1, *rollout())
    assert "this rollout is not kept" in caplog.text


class Trainer:
    """A trainer whose scores and KL rise from rollout to rollout."""

    def __init__(self, folder, *, done: int):
        run = SimpleNamespace(
            output_dir=str(folder),
            log_interval_s=0.0,
            print_answers=False,
            save_rollouts=4,
            eval_interval=0,
        )
        self.config = SimpleNamespace(run=run, has_reference=True)
        self.engines = SimpleNamespace(train=lambda: None)
        self.rollouts = done

    def generate_experience(self, batches):
        self.rollouts += 1
        values = {
            "objective/score": float(self.rollouts),
            "objective/score_std": 1.0,
            "objective/kl": 10.0 * self.rollouts,
            "response/length_mean": 20.0,
        }
        return *rollout(), values

    def train_rlhf(self, experience):
        return {}


class State(contextlib.nullcontext):
    """The state of a run after `step` rollouts."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step
        self.callbacks = Callbacks()

    def windows(self):
        while True:
            yield []

    def end_step(self, *, last):
        self.step += 1


def train(folder, *, done: int, rollouts: int) -> None:
    metrics = MetricsWriter(folder, resume_from=done or None)
    evaluator = SimpleNamespace(evaluate=lambda rollout: {}, samples=[])
    trainer = Trainer(folder, done=done)
    state = State(done)
    ppo_run.train_ppo(
        trainer, state, evaluator, rollouts=rollouts, metrics=metrics, tokenizer=Letters()
    )
    metrics.close()


def test_the_training_loop_keeps_rollouts_and_alarms(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ppo_run, "_speed", lambda *args: {"perf/tokens_per_s": 1.0})
    stale = tmp_path / "rollouts" / "rollout_000099.jsonl"
    stale.parent.mkdir()
    stale.touch()
    train(tmp_path, done=0, rollouts=12)
    names = ["rollout_000004.jsonl", "rollout_000008.jsonl", "rollout_000012.jsonl"]
    assert sorted(path.name for path in stale.parent.iterdir()) == names
    assert lines(stale.parent / names[0]) == ROWS
    alarms = json.loads((tmp_path / "alarms.json").read_text())
    assert [(alarm["rollout"], alarm["name"]) for alarm in alarms] == [(10, "kl")]
    assert caplog.text.count("alarm after rollout 10") == 1

    # Resumed before the alarm: the rollouts after it are repeated.
    train(tmp_path, done=7, rollouts=9)
    assert sorted(path.name for path in stale.parent.iterdir()) == names[:2]
    assert not (tmp_path / "alarms.json").exists()
    train(tmp_path, done=9, rollouts=12)
    assert json.loads((tmp_path / "alarms.json").read_text()) == alarms
