"""report.html and model cards of planted runs, in text and in a real browser."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from browser import CHROMIUM, Browser

from dschat.report import __main__ as command
from dschat.report.charts import histogram, line_chart, number_text
from dschat.report.model_card import write_model_card
from dschat.report.page import REPORT, run_page, write_report
from dschat.report.run_files import read_run
from dschat.trainers import supervised
from dschat.trainers.output_folder import write_pages

EVIL = '</script><script>console.error("ran")</script><img src=x onerror=console.error(1)>'
VOID = {"meta", "link", "br", "img", "circle", "rect", "line", "polyline"}


class Page(HTMLParser):
    """Elements and text of a page; checks that all elements are closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_record(folder: Path, step: str, **more) -> None:
    record = {
        "step": step,
        "config": {
            "model_name_or_path": "owner/base",
            "data_path": ["owner/rows", "/data/rows.jsonl"],
            "learning_rate": 1e-4,
            "seed": 1234,
            "prompt_key": None,
        },
        "dtype": "bf16",
        "hardware": {"cpu": EVIL, "cpu_cores": 2},
        "versions": {"torch": "2.12"},
        **more,
    }
    (folder / "run.json").write_text(json.dumps(record))


def plant_sft(folder: Path, *, rate: float = 1.0) -> Path:
    rows = [{"step": 0, "eval/loss": 5.0, "eval/perplexity": 148.4}]
    for step in range(1, 41):
        loss = 4.5 * math.exp(-rate * step / 40)
        rows.append({"step": step, "train/loss": loss, "train/lr": 1e-4, "perf/mem_gib": 1.25})
    rows[5]["train/grad_norm"] = None
    rows[-1] |= {"eval/loss": 3.0, "eval/perplexity": 20.1, "a/new_metric": 7.0}
    write_lines(folder / "metrics.jsonl", rows)
    write_record(folder, "Step 1, supervised fine-tuning", total_steps=40)
    return folder


def plant_reward(folder: Path) -> Path:
    rows = [{"step": step, "eval/accuracy": 0.5 + step / 10} for step in range(5)]
    write_lines(folder / "metrics.jsonl", rows)
    write_record(folder, "Step 2, reward model")
    (folder / "evaluation").mkdir()
    for step, shift in ((0, 0.0), (2, 0.5), (4, 2.0)):
        margins = [shift + math.sin(i) for i in range(100)]
        (folder / "evaluation" / f"margins_{step:06d}.json").write_text(
            json.dumps({"margins": margins})
        )
    return folder


def plant_ppo(folder: Path) -> Path:
    rows = [{"step": 0, "eval/score": 0.1, "eval/kl": 0.0}]
    rows += [
        {
            "step": step,
            "objective/score": step / 10,
            "objective/entropy": 2.0,
            "time/generate_s": 1.0,
            "time/score_s": 0.5,
            "time/train_s": 2.0,
        }
        for step in range(1, 9)
    ]
    rows[-1] |= {"eval/score": 0.9, "eval/kl": 3.5}
    write_lines(folder / "metrics.jsonl", rows)
    write_record(folder, "Step 3, PPO", rollouts=8, planned_memory_gib={"a GPU": 3.5})
    answers = {0: "It was a dull film", 4: "skipped", 8: "It was a great film \ud800" + EVIL}
    for rollout, answer in answers.items():
        found = [
            {"prompt": f"Movie review {i}: {EVIL}", "answer": answer, "score": rollout / 8}
            for i in range(25)
        ]
        write_lines(folder / "evaluation" / f"rollout_{rollout:06d}.jsonl", found)
    return folder


def plant_pipeline(folder: Path) -> Path:
    plant_sft(folder / "actor-models" / "tiny")
    plant_reward(folder / "reward-models" / "tiny")
    plant_ppo(folder / "step3-models" / "tiny")
    summary = {
        "samples": [
            {"prompt": "The film", "base": "is is is", "sft": "was long", "rlhf": "was very " * 90}
        ],
        "seconds": {"sft": 53.0, "total": 475.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_step_shows_its_curves_results_and_configuration(tmp_path):
    text = run_page(read_run(plant_sft(tmp_path)))
    page = Page(text)
    for words in ("Step 1, supervised fine-tuning", "owner/base", "train/loss", "148.4", "20.1"):
        assert words in page.text
    assert "used, most on rank 0" in page.text and "1.25 GiB" in page.text
    # A metric that the page does not know is shown, too; one without values is not.
    assert "a/new_metric" in page.text and "train/grad_norm" not in page.text
    charts = re.findall(r"<figcaption>(.*?) <", text)
    assert charts == ["Loss", "Perplexity", "Memory used, GiB", "Learning rate", "a/new_metric"]


def test_alarms_are_shown_as_text(tmp_path):
    folder = plant_ppo(tmp_path)
    assert "Alarms" not in Page(run_page(read_run(folder))).text
    alarms = [{"rollout": 12, "name": "kl", "message": f"the KL went up {EVIL}"}]
    (folder / "alarms.json").write_text(json.dumps(alarms))
    text = run_page(read_run(folder))
    assert f"After rollout 12, the KL went up {EVIL}" in Page(text).text
    assert "<script" not in text


@pytest.mark.parametrize("damaged", ["{", "{}", "[1]", '[{"rollout": 1}]', "7"])
def test_a_damaged_file_of_alarms_is_left_out(tmp_path, damaged):
    folder = plant_ppo(tmp_path)
    (folder / "alarms.json").write_text(damaged)
    assert read_run(folder).alarms == []


def test_a_reward_model_shows_the_margins_before_and_after(tmp_path):
    run = read_run(plant_reward(tmp_path))
    assert sorted(run.margins) == ["after", "before"]
    assert max(run.margins["before"]) < 1.01 < min(run.margins["after"]) + 1.0
    assert run_page(run).count('class="bar ') == 2 * 10


def test_answers_are_side_by_side_with_scores_and_marks(tmp_path):
    run = read_run(plant_ppo(tmp_path))
    assert len(run.prompts) == 25 and list(run.prompts[0].answers) == ["sft", "rlhf"]
    text = run_page(run)
    assert text.count('<div class="prompt">') == 20 and "(20 of 25)" in text
    assert "SFT, score 0.00" in text and "RLHF, score 1.00" in text
    assert "<mark>great</mark> film" in text and "<mark>It" not in text
    assert "planned, a GPU" in text and "3.50 GiB" in text


def test_text_of_a_run_is_never_markup(tmp_path):
    write_report(plant_ppo(tmp_path))
    text = (tmp_path / REPORT).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "iframe"} & set(page.tags)
    assert EVIL in page.text  # shown as it is: in prompts, answers and hardware
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)=\"(?!data:,\")|url\(|@import", text)


def test_the_page_of_a_pipeline_holds_every_step_and_three_models(tmp_path):
    assert write_report(plant_pipeline(tmp_path)) == tmp_path / REPORT
    text = (tmp_path / REPORT).read_text(encoding="utf-8")
    page = Page(text)
    for title in ("Step 1, supervised fine-tuning", "Step 2, reward model", "Step 3, PPO"):
        assert f"<h2>{title}</h2>" in text
    names = re.findall(r'<span class="name">(\w+)', text)
    assert names[:3] == ["BASE", "SFT", "RLHF"]
    assert "475" in page.text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no metrics.jsonl. Give the --output_dir of a step"):
        write_report(tmp_path)


def test_damaged_files_cost_their_part_alone(tmp_path):
    plant_sft(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "train/lo')
    (tmp_path / "run.json").write_text("{")
    run = read_run(tmp_path)
    assert len(run.curves["train/loss"]) == 40 and run.title == tmp_path.name
    Page(run_page(run))


def test_runs_are_compared_by_metric_and_setting(tmp_path, monkeypatch, capsys):
    folders = [plant_sft(tmp_path / name / "sft", rate=rate) for name, rate in (("a", 1), ("b", 3))]
    record = json.loads((folders[1] / "run.json").read_text())
    record["config"]["learning_rate"] = 3e-4
    (folders[1] / "run.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    command.main([str(folder) for folder in folders])
    assert capsys.readouterr().out.strip().endswith("comparison.html")
    text = (tmp_path / "comparison.html").read_text()
    page = Page(text)
    # Named by as much of the path as tells the runs apart.
    assert "a/sft" in page.text and "b/sft" in page.text
    loss = text[text.index("train/loss") :].split("</figure>")[0]
    assert loss.count("<polyline") == 2
    table = text[text.index("Settings that differ") :]
    assert "learning_rate" in table and "0.0003" in table and "seed" not in table
    command.main([str(folders[0])])
    assert (folders[0] / REPORT).exists()


def test_a_line_goes_from_its_first_to_its_last_value():
    text = line_chart("t", {"a": [(0, 0.0), (10, 1.0)]}, x_label="update")
    first, last = re.search(r'points="([^"]*)"', text)[1].split()
    (x0, y0), (x1, y1) = (map(float, place.split(",")) for place in (first, last))
    assert (x0, x1) == (46.0, 350.0)
    assert y0 > y1  # upwards, and within the frame with a margin
    assert 10 < y1 < 20 and 165 < y0 < 178


@pytest.mark.parametrize("points", [[(3, 1.0)], [(0, 2.0), (1, 2.0)], [(0, 0.0), (1, 0.0)]])
def test_flat_and_single_points_have_a_chart(points):
    Page(line_chart("t", {"a": points, "none": []}, x_label="update"))


def test_long_curves_are_thinned_by_means():
    text = line_chart("t", {"a": [(i, float(i % 2)) for i in range(4000)]}, x_label="update")
    places = re.search(r'points="([^"]*)"', text)[1].split()
    assert len(places) == 400 and len({place.split(",")[1] for place in places}) == 1


def test_a_histogram_adds_up_to_one():
    text = histogram("t", {"a": [0.0] * 3 + [1.0]}, x_label="margin")
    shares = [float(share) for share in re.findall(r"a: ([\d.]+)%", text)]
    assert shares == [75.0, 0.0, 0.0, 25.0]


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.5, "0.5"),
        (148.41, "148.4"),
        (9999.9, "10,000"),
        (1e-5, "1e-05"),
        (2e9, "2e+09"),
    ],
)
def test_numbers_are_short(value, text):
    assert number_text(value) == text


def save_config(folder: Path, architecture: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))


def test_a_model_card_has_the_head_that_the_hub_reads(tmp_path):
    run = read_run(plant_sft(tmp_path))
    save_config(tmp_path, "LlamaForCausalLM")
    assert write_model_card(tmp_path, run)
    _, head, body = (tmp_path / "README.md").read_text().split("---\n")
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/base",
        "datasets": ["owner/rows"],
        "tags": ["dschat", "deepspeed", "sft"],
    }
    for words in ("148.4 to 20.1", "| learning\\_rate | 0.0001 |", "AutoModelForCausalLM"):
        assert words in body
    # It is written again by the next run, unless the user has replaced it.
    assert write_model_card(tmp_path, run)
    (tmp_path / "README.md").write_text("mine")
    assert not write_model_card(tmp_path, run)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_run_ends_with_a_report_and_a_card_beside_each_model(tmp_path, shown):
    plant_ppo(tmp_path)
    save_config(tmp_path / "actor", "LlamaForCausalLM")
    save_config(tmp_path / "critic", "LlamaForSequenceClassification")
    write_pages(str(tmp_path))
    assert shown == [
        f"report: {tmp_path / REPORT}",
        f"next: python inference/chat.py --path {tmp_path / 'actor'}",
    ]
    tags = [
        yaml.safe_load((tmp_path / name / "README.md").read_text().split("---\n")[1])
        for name in ("actor", "critic")
    ]
    assert [tag["pipeline_tag"] for tag in tags] == ["text-generation", "text-classification"]
    assert not (tmp_path / "README.md").exists()


def test_a_report_that_fails_costs_no_run(tmp_path, shown):
    write_pages(str(tmp_path))
    assert "no report was written" in shown[0] and "python -m dschat.report" in shown[0]
    write_pages(None)


def test_margins_are_saved_for_the_report(tmp_path):
    run = SimpleNamespace(config=SimpleNamespace(run=SimpleNamespace(output_dir=str(tmp_path))))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "margins_000009.json").touch()  # of an earlier run
    for step, margin in ((0, 0.5), (4, 2.0)):
        objective = SimpleNamespace(margins=torch.tensor([margin, -1.0]))
        supervised._save_margins(objective, run, step=step)
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0}])
    assert read_run(tmp_path).margins == {"before": [0.5, -1.0], "after": [2.0, -1.0]}


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")
def test_a_browser_shows_the_page_without_errors_requests_or_overflow(tmp_path):
    path = write_report(plant_pipeline(tmp_path))
    with Browser() as browser:
        for width, dark in ((1280, False), (390, True), (320, False)):
            browser.open(path.as_uri(), width=width, dark=dark)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("document.querySelectorAll('svg').length") > 8
            background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(20, 23, 28)") == dark
        assert browser.faults == []
        assert set(browser.requests) <= {path.as_uri(), "data:,"}
