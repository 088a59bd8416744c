"""Package metadata. requirements.txt lists what it needs at run time."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
REQUIREMENTS = [
    line
    for line in (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
README = HERE / "README.md"
# chat: the chat server (inference/chat.py --serve). The terminal needs none of it.
CHAT = ["fastapi>=0.115", "uvicorn>=0.32"]
# demo: fetching the embedded default's model, drawing its curves, and chatting with it on a page.
DEMO = ["gguf>=0.17", "matplotlib>=3.8", *CHAT]
# zstd: data files with the suffix .zst.
ZSTD = ["zstandard>=0.22"]
# math: the grader math_match of --reward_fn.
MATH = ["math-verify>=0.8"]
# schema: the grader json_schema of --reward_fn.
SCHEMA = ["jsonschema>=4.18"]
# Loggers of --report_to. TensorBoard comes with the requirements.
LOGGERS = {"wandb": ["wandb>=0.17"], "trackio": ["trackio>=0.3"], "mlflow": ["mlflow>=2.14"]}
# docs: scripts/build_docs.py.
DOCS = ["zensical>=0.0.73,<0.2"]
# test: pytest and what scripts/lint.sh runs. Formatters and type checkers change between versions,
# so theirs are fixed.
TEST = [
    "pytest>=8",
    "pytest-cov>=5",
    "pytest-xdist>=3",
    "hypothesis>=6.100",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "types-PyYAML",
    "types-psutil",
    *DEMO,
    *ZSTD,
    *MATH,
    *SCHEMA,
    "httpx>=0.27",  # fastapi's test client
    "setuptools>=70",  # builds the wheel that a test looks into
    "playwright>=1.49",  # drives the system's chromium; brings none by itself
]

# What a wheel holds beside the package, below dschat/programs.
PROGRAMS = ("training", "inference", "scripts", "e2e_rlhf.py")


class BuildWithPrograms(build_py):
    """Copies the mains and the launch scripts into the package, so that a wheel is complete."""

    def run(self):
        """Build the package, then add the programs unless it is installed in place."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "dschat" / "programs"
        target.mkdir(parents=True, exist_ok=True)
        for name in PROGRAMS:
            if (HERE / name).is_dir():
                skipped = shutil.ignore_patterns("__pycache__")
                shutil.copytree(HERE / name, target / name, ignore=skipped, dirs_exist_ok=True)
            else:
                shutil.copy2(HERE / name, target / name)


setup(
    name="dschat",
    version="0.1.0",
    description="Supervised fine-tuning, reward modelling and PPO on DeepSpeed",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=find_packages(include=["dschat", "dschat.*"]),
    install_requires=REQUIREMENTS,
    extras_require={
        "chat": CHAT,
        "demo": DEMO,
        "docs": DOCS,
        "test": TEST,
        "math": MATH,
        "schema": SCHEMA,
        "zstd": ZSTD,
        **LOGGERS,
    },
    cmdclass={"build_py": BuildWithPrograms},
    entry_points={"console_scripts": ["dschat = dschat.cli:main"]},
    package_data={"dschat.serving": ["page.html"]},
)
