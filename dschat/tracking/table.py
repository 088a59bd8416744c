"""Text tables."""


def table(rows: list[list[str]], *, header: list[str]) -> str:
    """Format a table; the first column is aligned to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        others = [row[i].rjust(widths[i]) for i in range(1, len(widths))]
        lines.append("  ".join([first, *others]))
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
