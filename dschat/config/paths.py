"""Paths as users give them."""

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """`path` with the home folder in the place of ~ or ~NAME; as it is where there is no such user."""
    return Path(os.path.expanduser(path))
