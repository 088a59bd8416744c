"""Build the documentation as a site, and check its links.

    pip install "zensical>=0.0.73,<0.2"    # or pip install -e .[docs]
    python scripts/build_docs.py [--repository https://github.com/OWNER/NAME]

The site has the guides of all folders under the repository's paths, so that links between them work
on the site as they do in the repository. It is written to build/site. A link without a target is an
error.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGED = ROOT / "build" / "docs"
PAGES = ("*.md", "docs/**/*.md", "training/*/README.md", "inference/*.md")
PICTURES = ("docs/**/*.png",)
# A block or span of code, or a link outside of code.
CODE_OR_LINK = re.compile(
    r"^```.*?^```|`[^`\n]+`|(?P<text>\[[^\[\]]*\])\((?P<target>[^()\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def main() -> int:
    """Copy the pages, build the site and return the exit status."""
    args = parse_args()
    missing = copy_pages(STAGED, args.repository)
    for link in missing:
        print(f"error: {link}", file=sys.stderr)
    if missing:
        return 1
    if not find_spec("zensical"):
        print('error: zensical is missing. Run: pip install -e ".[docs]"', file=sys.stderr)
        return 1
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(build, cwd=ROOT, check=False).returncode


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repository",
        help="address of the repository; without it, the site does not link to source files",
    )
    return parser.parse_args()


def copy_pages(target: Path, repository: str | None = None) -> list[str]:
    """Copy all pages and pictures to a folder, each under its path in the repository.

    Args:
        target: the folder, which is replaced.
        repository: the address that links to other files of the repository get; None turns these
            links into plain text.

    Returns:
        A message for each link to a file that does not exist.
    """
    shutil.rmtree(target, ignore_errors=True)
    copied = {*files(PAGES), *files(PICTURES)}
    missing = []
    for path in sorted(copied):
        copy = target / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".md":
            shutil.copyfile(ROOT / path, copy)
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        missing += [
            f"{path} links to {link}, which does not exist" for link in dead_links(path, text)
        ]
        copy.write_text(replace_links(path, text, copied, repository), encoding="utf-8")
    return missing


def files(patterns: tuple[str, ...]) -> list[Path]:
    """Return the files of the patterns, relative to the repository."""
    return [path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)]


def dead_links(page: Path, text: str) -> list[str]:
    """Return the links of a page to files that do not exist."""
    links = [match["target"] for match in CODE_OR_LINK.finditer(text)]
    return [link for link in links if is_local(link) and not (ROOT / resolve(page, link)).exists()]


def replace_links(page: Path, text: str, copied: set[Path], repository: str | None) -> str:
    """Return a page's text whose links to files outside of the site are replaced."""

    def replace(match: re.Match) -> str:
        link = match["target"]
        if not is_local(link) or resolve(page, link) in copied:
            return match[0]
        if repository:
            return f"{match['text']}({repository}/tree/main/{resolve(page, link).as_posix()})"
        return match["text"][1:-1]

    return CODE_OR_LINK.sub(replace, text)


def is_local(link: str | None) -> bool:
    """Tell whether a link is a path in the repository; None is code."""
    return link is not None and not re.match(r"[a-z]+:|#", link)


def resolve(page: Path, link: str) -> Path:
    """Return the path in the repository that a link of a page names."""
    return Path(os.path.normpath(page.parent / link.partition("#")[0]))


if __name__ == "__main__":
    sys.exit(main())
