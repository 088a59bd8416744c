"""The figure of a sweep: curves by folder name, and missing runs."""

import json

import pytest

from scripts.plot_sweep import main, moving_average, read_curves, summary


def write_run(folder, name: str, values) -> None:
    (folder / name).mkdir()
    lines = [{"step": 0, "eval/score": 1.0}]
    lines += [
        {"step": step, "objective/score": value} for step, value in enumerate(values, start=1)
    ]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_are_read_and_missing_ones_are_named(tmp_path):
    write_run(tmp_path, "z2_he_true_offload_false_lora_true", [0.5, None, 2.0, 1.5])
    write_run(tmp_path, "z3_he_false_offload_false_lora_false", [])
    curves, missing = read_curves(tmp_path, "objective/score")
    assert set(curves) == {"z2_he_true_offload_false_lora_true"} and len(missing) == 15
    assert (
        "z3_he_false_offload_false_lora_false" in missing
        and "z3_he_true_offload_true_lora_true" in missing
    )
    (curve,) = curves.values()
    assert [step for step, _ in curve] == [1, 2, 3, 4]
    assert summary(curve) == ["4", "0.500", "1.500", "2.000"]


def test_a_moving_average_starts_with_fewer_values():
    assert moving_average([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert moving_average([1.0, 3.0], 1) == [1.0, 3.0]


def test_the_figure_is_written_and_no_run_is_an_error(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["plot_sweep.py", str(tmp_path), "--smooth", "2"])
    assert main() == 1
    write_run(tmp_path, "z2_he_true_offload_false_lora_true", [0.5, 1.0])
    write_run(tmp_path, "z3_he_false_offload_true_lora_false", [0.5, 1.0])
    assert main() == 0
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("no objective/score in") == 16 + 14
