import hashlib
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dschat.demo.downloads import fetch_from_pypi
from dschat.runtime.paths import cache_dir

FILENAME = "tiny_thing-1.0-py3-none-any.whl"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Give pip one wheel in a local folder and no network; return the wheel's sum."""
    (tmp_path / "shelf").mkdir()
    with zipfile.ZipFile(tmp_path / "shelf" / FILENAME, "w") as wheel:
        info = "tiny_thing-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("DSCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    return hashlib.sha256((tmp_path / "shelf" / FILENAME).read_bytes()).hexdigest()


def fetch(sha256, requirement="tiny-thing==1.0"):
    return fetch_from_pypi(requirement, filename=FILENAME, sha256=sha256)


def test_cache_dir_by_environment(monkeypatch):
    monkeypatch.setenv("DSCHAT_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("DSCHAT_CACHE")
    assert cache_dir() == Path("/b/dschat")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/h")
    assert cache_dir() == Path("/h/.cache/dschat")


def test_fetched_once_and_nothing_left_over(offline, tmp_path, monkeypatch):
    with ThreadPoolExecutor(2) as pool:  # two at the same time
        first, second = pool.map(fetch, [offline] * 2)
    assert first == second == tmp_path / "cache" / "downloads" / FILENAME
    assert [path.name for path in first.parent.iterdir()] == [FILENAME]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # an empty shelf: pip would fail now
    assert fetch(offline) == first


def test_damaged_copy_is_fetched_again(offline, tmp_path):
    target = tmp_path / "cache" / "downloads" / FILENAME
    target.parent.mkdir(parents=True)
    target.write_bytes(b"damaged")
    assert hashlib.sha256(fetch(offline).read_bytes()).hexdigest() == offline


def test_wrong_sum_names_file_both_sums_and_remedy(offline, tmp_path):
    with pytest.raises(ValueError) as caught:
        fetch("0" * 64)
    message = str(caught.value)
    assert "pip could not get it" in message  # refused by pip, before it would run a setup.py
    assert all(
        word in message
        for word in (FILENAME, "0" * 64, offline, str(tmp_path / "cache" / "downloads"))
    )
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_no_network_names_file_and_remedy(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ValueError, match=rf"{FILENAME}: pip could not get it: .*Put {FILENAME} .*DSCHAT_CACHE"
    ):
        fetch(offline)


@pytest.mark.parametrize(
    "name, words",
    [(FILENAME, f"{FILENAME}: sha256 .* instead of 0000"), ("b.whl", r"pip brought \['b.whl'\]")],
)
def test_the_downloaded_file_is_checked_again(offline, tmp_path, monkeypatch, name, words):
    careless = tmp_path / "python"
    careless.write_text(
        "#!/bin/sh\n"
        f'for word; do [ "$last" = -d ] && echo x > "$word/{name}"; last=$word; done; true\n'
    )
    careless.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(careless))
    with pytest.raises(ValueError, match=words):
        fetch("0" * 64)
