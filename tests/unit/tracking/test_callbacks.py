"""Which callbacks are called, on which rank."""

from pathlib import Path

from dschat.tracking.callbacks import Callback, Callbacks


class Notes(Callback):
    def __init__(self):
        self.notes = []

    def on_update(self, step, metrics):
        self.notes.append(("update", step, metrics))

    def on_evaluate(self, step, metrics):
        self.notes.append(("evaluate", step, metrics))

    def on_save(self, folder):
        self.notes.append(("save", folder))


class EveryRank(Notes):
    every_rank = True


class Rollouts(Notes):
    def on_rollout(self, step, rows):
        self.notes.append(("rollout", step, rows))


def call_all(callbacks: Callbacks) -> None:
    callbacks.on_update(1, {"train/loss": 2.0})
    callbacks.on_evaluate(1, {"train/loss": 2.0})
    callbacks.on_evaluate(2, {"train/loss": 2.0, "eval/loss": 1.0})
    callbacks.on_rollout(3, [{"prompt": "p"}])
    callbacks.on_save(Path("out"))


def test_each_is_called_and_evaluations_have_their_metrics_alone():
    first, second = Notes(), Rollouts()
    call_all(Callbacks([first, second, Callback()]))
    assert first.notes == [
        ("update", 1, {"train/loss": 2.0}),
        ("evaluate", 2, {"eval/loss": 1.0}),
        ("save", Path("out")),
    ]
    assert second.notes == [*first.notes[:2], ("rollout", 3, [{"prompt": "p"}]), first.notes[2]]


def test_other_ranks_call_only_those_for_every_rank(as_rank_1):
    one, every = Notes(), EveryRank()
    call_all(Callbacks([one, every]))
    assert one.notes == [] and len(every.notes) == 3


def test_rows_of_rollouts_are_gathered_if_any_reads_them(as_rank_1):
    assert Callbacks([Notes(), Rollouts()]).read_rollouts
    assert not Callbacks([Notes(), EveryRank()]).read_rollouts
