"""How a plan writes its numbers."""


def count(number: float) -> str:
    """The text of parameters or tokens is `1.23B`, or `4.5M` below a billion."""
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"
