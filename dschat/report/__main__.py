"""Write report.html of a run again, or compare several runs on one page.

python -m dschat.report output/sft              # writes output/sft/report.html
python -m dschat.report output                  # of e2e_rlhf.py: all three steps
python -m dschat.report run1 run2 run3          # writes comparison.html
"""

import argparse
import sys
from pathlib import Path

from dschat.report.page import comparison_page, write_report
from dschat.report.run_files import Run, is_run, read_run, step_folders
from dschat.runtime.files import write_text
from dschat.runtime.paths import user_path


def main(argv: list[str] | None = None) -> None:
    """Write the page and print its path."""
    parser = argparse.ArgumentParser(
        prog="python -m dschat.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="output folder of a run")
    parser.add_argument(
        "--output",
        default="comparison.html",
        help="file of a comparison; default: comparison.html in the current folder",
    )
    args = parser.parse_args(argv)
    folders = [user_path(name) for name in args.folders]
    if len(folders) == 1:
        print(write_report(folders[0]))
        return
    path = user_path(args.output)
    write_text(path, comparison_page(_named_runs(folders)))
    print(path)


def _named_runs(folders: list[Path]) -> dict[str, Run]:
    """Return every run in the folders, named by the shortest ends of their paths that differ."""
    runs = []
    for folder in folders:
        runs += [folder] if is_run(folder) else step_folders(folder) or [folder]
    paths = [path.resolve() for path in runs]
    names = _short_names(paths)
    return {name: read_run(path) for name, path in zip(names, paths, strict=True)}


def _short_names(paths: list[Path]) -> list[str]:
    """Return the last parts of each path, as many as it takes to tell the paths apart."""
    distinct = list(dict.fromkeys(paths))
    for count in range(1, max(len(path.parts) for path in distinct) + 1):
        names = {path: "/".join(path.parts[-count:]) for path in distinct}
        if len(set(names.values())) == len(distinct):
            break
    return [names[path] for path in paths]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
