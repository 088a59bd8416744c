"""The workflows: what they run exists, and their libraries are those of requirements.txt."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]
CI = ROOT / ".github" / "workflows" / "ci.yml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def requirement(name: str) -> Requirement:
    """Return a line of requirements.txt."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line]
    (found,) = [line for line in lines if line.startswith(f"{name}>")]
    return Requirement(found)


def lowest(found: Requirement) -> str:
    return next(str(spec.version) for spec in found.specifier if spec.operator == ">=")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_job_has_a_limit_and_runs_scripts_that_exist(path):
    workflow = read(path)
    assert workflow["permissions"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 330 and job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            for script in re.findall(r"\bscripts/\w+\.sh", step.get("run", "")):
                assert (ROOT / script).is_file()


def test_the_oldest_and_newest_libraries_are_tested():
    workflow = read(CI)
    rows = workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]
    assert [row["python"] for row in rows] == ["3.10", "3.11", "3.12", "3.13"]
    for row in rows:
        for name in ("torch", "transformers", "deepspeed"):
            tested = Requirement(row[name])
            if row["libraries"] == "oldest":
                version = str(next(iter(tested.specifier)).version).removesuffix(".*")
                assert lowest(requirement(name)) in (version, f"{version}.0")
    (newest,) = [row["torch"] for row in rows if row["libraries"] == "newest"]
    minor = int(re.fullmatch(r"torch==2\.(\d+)\.\*", newest)[1])
    assert requirement("torch").specifier.contains(f"2.{minor}.0")
    assert not requirement("torch").specifier.contains(f"2.{minor + 1}.0")


def test_the_usual_libraries_are_those_of_requirements():
    workflow = read(CI)
    rows = workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]
    for row in rows:
        if row["libraries"] != "oldest":
            for name in ("transformers", "deepspeed"):
                assert Requirement(row[name]).specifier == requirement(name).specifier


def test_markers_are_described_for_contributors():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    markers = re.findall(r"^    (\w+): ", (ROOT / "pytest.ini").read_text(), re.MULTILINE)
    assert markers == ["slow", "gpu"]
    assert all(f"-m {marker}" in text for marker in markers)


def test_the_documentation_is_built_with_the_version_of_the_extra():
    commands = [step.get("run", "") for step in read(CI)["jobs"]["docs"]["steps"]]
    (wanted,) = re.findall(r'^DOCS = \["(.*)"\]$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert any(f'pip install "{wanted}"' in command for command in commands)
