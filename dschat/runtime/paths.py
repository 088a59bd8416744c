"""Paths given by users, and the cache folder."""

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """Replace a leading ~ or ~NAME by the home folder; an unknown user leaves `path` unchanged."""
    return Path(os.path.expanduser(path))


def cache_dir() -> Path:
    """Return $DSCHAT_CACHE, else $XDG_CACHE_HOME/dschat, else ~/.cache/dschat.

    The folder is not created here. Everything in it can be made or downloaded again.
    """
    if os.environ.get("DSCHAT_CACHE"):
        return user_path(os.environ["DSCHAT_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dschat"
