"""The compose file starts mains and flags that exist."""

import re
from pathlib import Path

import yaml

from dschat.config.parse import parse_config
from dschat.config.sft import SFTConfig

ROOT = Path(__file__).resolve().parents[2]


def test_the_compose_file_starts_a_main_with_its_flags():
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["train"]
    main, *flags = service["command"]
    assert (ROOT / main.removeprefix("/opt/dschat/")).is_file()
    words = [word for flag in flags for word in flag.split("=", 1)]
    config = parse_config(SFTConfig, words)
    assert config.run.output_dir == "/work/output/sft"


def test_the_page_names_the_variables_and_arguments():
    page = (ROOT / "docs" / "docker.md").read_text()
    variables = re.findall(r"\$\{([A-Z_]+)", (ROOT / "compose.yaml").read_text())
    arguments = re.findall(r"^ARG ([A-Z_]+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert [name for name in (*variables, *arguments) if f"`{name}`" not in page] == []
