"""Paths as users give them."""

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """`path` with the home folder in the place of ~ or ~NAME; as it is where there is no such user."""
    return Path(os.path.expanduser(path))


def cache_dir() -> Path:
    """$DSCHAT_CACHE, else $XDG_CACHE_HOME/dschat, else ~/.cache/dschat; not created here.

    All that lies there can be made or fetched again.
    """
    if os.environ.get("DSCHAT_CACHE"):
        return user_path(os.environ["DSCHAT_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dschat"
