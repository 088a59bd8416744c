"""The references that graders compare answers with: a column of the data set."""

# Columns that hold the reference if none is named, in this order.
REFERENCE_COLUMNS = ("target", "solution", "ground_truth", "reference", "chosen")


class MissingColumn(ValueError):
    """Raised if the data set has no column that a grader needs."""


def references(columns: dict[str, list], column: str = "") -> list:
    """Return one reference per answer; None if the row has none.

    Args:
        columns: the rows' other columns, by name.
        column: its name; "": the first of ``REFERENCE_COLUMNS`` that the data set has.

    Raises:
        MissingColumn: there is no such column.
    """
    names = (column,) if column else REFERENCE_COLUMNS
    for name in names:
        if name in columns:
            return columns[name]
    found = ", ".join(sorted(columns)) or "none"
    raise MissingColumn(
        f"the rows need a column {' or '.join(names)} with the reference, and have {found}. Name "
        "another column, for example: numeric_match(column='result')."
    )
