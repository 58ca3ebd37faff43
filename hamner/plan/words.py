"""Numbers and tables are written for people in the same way everywhere."""

from collections.abc import Iterable, Sequence


def count(number: float) -> str:
    """The text of parameters or tokens in a plan is `1.23B`, `4.5M` below a billion, or `6.7K`."""
    if number < 1e5:
        return f"{number / 1e3:.1f}K"
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def short(number: float, form: str = ".4g") -> str:
    """The text is short: `2.5B`, `819.2K`; `form` formats what stands before the unit."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:{form}}{unit}"
    return f"{number:.4g}"


def table(rows: Iterable[Sequence[object]]) -> str:
    """The first row of the Markdown table is its header, the first column text, others figures."""
    header, *body = rows
    rule = ("---", *("---:" for _ in header[1:]))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, rule, *body))
