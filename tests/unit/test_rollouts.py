"""python -m dschat.rollouts on planted files."""

import json
import subprocess
import sys

import pytest

from dschat import rollouts

ANSWERS = {
    4: [("one?", "first answer", 1.0, 10, -3.0), ("two?", "a dull film", -1.0, 30, -5.0)],
    12: [
        ("one?", "better answer", 2.5, 12, -4.0),
        ("three?", "dull \x1b[31mred", 0.5, 8, -2.0),
        ("four?", "longest", 1.5, 40, -9.0),
    ],
}


@pytest.fixture
def folder(tmp_path):
    """Return the output folder of a run with two kept rollouts."""
    (tmp_path / "rollouts").mkdir()
    for number, answers in ANSWERS.items():
        rows = [
            {
                "prompt": prompt,
                "answer": answer,
                "length": length,
                "score": score,
                "reward": score / 2,
                "advantage": 0.0,
                "logprob": logprob,
                "ref_logprob": logprob - length / 10,
                "ended": length < 30,
            }
            for prompt, answer, score, length, logprob in answers
        ]
        path = tmp_path / "rollouts" / f"rollout_{number:06d}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def shown(capsys, folder, *flags: str) -> str:
    rollouts.main([str(folder), *flags])
    return capsys.readouterr().out


def prompts(text: str) -> list[str]:
    """Return the shown prompts, in order."""
    return [line.split(": ")[1] for line in text.splitlines() if line.startswith("prompt: ")]


def test_without_flags_it_shows_a_table_and_the_last_rollout(capsys, folder):
    text = shown(capsys, folder)
    header, _, first, last = text.splitlines()[:4]
    assert header.split() == ["rollout", "answers", "score", "reward", "kl", "length", "ended"]
    assert first.split() == ["4", "2", "0.000", "0.000", "2.000", "20.000", "0.500"]
    assert last.split() == ["12", "3", "1.500", "0.750", "2.000", "20.000", "0.667"]
    assert "rollout 12: 3 of 3 answers" in text
    assert prompts(text) == ["one?", "three?", "four?"]
    assert "score 2.5  reward 1.25  advantage 0  kl 1.2  length 12" in text
    assert text.count("truncated") == 1


def test_control_characters_are_escapes(capsys, folder):
    text = shown(capsys, folder)
    assert "\x1b" not in text
    assert "dull \\x1b[31mred" in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--rollout 4", ["one?", "two?"]),
        ("--sort score", ["three?", "four?", "one?"]),
        ("--sort score --reverse", ["one?", "four?", "three?"]),
        ("--sort length", ["three?", "one?", "four?"]),
        ("--sort kl --reverse", ["four?", "one?", "three?"]),
        ("--reverse", ["four?", "three?", "one?"]),
        ("--limit 2", ["one?", "three?"]),
        ("--limit 0", ["one?", "three?", "four?"]),
        ("--contains dull", ["three?"]),
        ("--contains four?", ["four?"]),
        ("--contains nowhere", []),
    ],
)
def test_flags_choose_and_order_answers(capsys, folder, flags, expected):
    assert prompts(shown(capsys, folder, *flags.split())) == expected


def test_two_rollouts_are_compared(capsys, folder):
    text = shown(capsys, folder, "--compare", "4", "12")
    assert [line.split()[0] for line in text.splitlines()[2:4]] == ["4", "12"]
    assert "1 of 1 prompts in both" in text
    assert prompts(text) == ["one?"]
    assert "rollout 4, score 1: first answer" in text
    assert "rollout 12, score 2.5: better answer" in text
    assert "dull" not in text


def test_files_of_evaluations_are_shown(capsys, tmp_path):
    row = {"prompt": "p", "answer": "a", "score": 1.0, "kl": 0.5, "length": 3, "ended": True}
    (tmp_path / "rollout_000000.jsonl").write_text(json.dumps(row) + "\n")
    assert "score 1  kl 0.5  length 3  ended" in shown(capsys, tmp_path)


def test_faults_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="rollout 5 was not kept. Kept are: 4, 12."):
        rollouts.main([str(folder), "--rollout", "5"])
    with pytest.raises(ValueError, match="--save_rollouts"):
        rollouts.main([str(tmp_path / "nowhere")])
    path = tmp_path / "rollouts" / "rollout_000012.jsonl"
    path.write_text('{"prompt": "p", "answer": "a", "score": 1.0, "length": 3}\n')
    with pytest.raises(ValueError, match="--sort kl: this run had no reference"):
        rollouts.main([str(folder), "--sort", "kl"])
    path.write_text('{"prompt": "p"}\n')
    with pytest.raises(ValueError, match="rollout_000012.jsonl:1: not an answer"):
        rollouts.main([str(folder)])


@pytest.mark.parametrize("flags", ["--limit -1", "--compare 4 12 --sort kl", "--sort nothing"])
def test_wrong_flags_are_refused(capsys, folder, flags):
    with pytest.raises(SystemExit):
        rollouts.main([str(folder), *flags.split()])
    assert flags.split()[0] in capsys.readouterr().err


def test_the_program_names_a_fault_in_one_line(tmp_path):
    command = [sys.executable, "-m", "dschat.rollouts", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
