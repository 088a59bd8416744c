"""Text that is safe to print."""


def escape_controls(text: str) -> str:
    """Write control characters but line ends as escapes: they could change the terminal."""
    return "".join(
        char if char == "\n" or char.isprintable() else ascii(char)[1:-1] for char in text
    )
