"""This package has the training step, the loop around it, and what a long run must survive."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`hamner.train.main` is the command's function for scripts that wrap it, loaded when asked."""
    if name == "main":
        from hamner.train.__main__ import main

        return main
    raise AttributeError(f"module {__name__} has no attribute {name}")
