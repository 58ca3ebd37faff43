"""The built-in corpus: the English that every Python installation carries, read offline.

The topics of `pydoc` and the docstrings of the standard library. The library is parsed, never
imported, so that reading it runs none of its code. Which documents there are depends on the
Python version, their order does not depend on anything.
"""

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hamner.data.shuffle import State, shuffled_documents
from hamner.errors import UserError

#: Parts of the standard library without prose, or with someone else's: tests, the editor and its
#: demos, grammar tables, the vendored installer.
SKIPPED = frozenset(
    {"__phello__", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests"}
    | {"turtledemo"}
)
#: Shorter documents (a lone "Return self.") teach nothing.
MIN_CHARACTERS = 200


@cache
def builtin_documents() -> tuple[str, ...]:
    """Every document of the corpus: one a topic, one a class, one a module.

    Raises:
        UserError: this Python carries neither the topics nor the library's sources.
    """
    unique = dict.fromkeys([*_topics(), *_docstrings()])
    documents = tuple(text for text in unique if len(text) >= MIN_CHARACTERS)
    if not documents:
        raise UserError(
            "--data builtin: this Python installation carries neither pydoc topics nor the "
            "standard library's sources; give a file or folder of text instead"
        )
    return documents


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name].strip() for name in sorted(topics)]


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        package = library / name
        paths = sorted(package.rglob("*.py")) if package.is_dir() else [library / f"{name}.py"]
        for path in paths:
            if path.is_file() and SKIPPED.isdisjoint(path.relative_to(library).parts):
                yield from _module_documents(path, seen)


def _module_documents(path: Path, seen: set[str]) -> Iterator[str]:
    """The module's docstring with its functions', then each class's with its methods'."""
    try:
        module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # some distributions keep templates and odd encodings there
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    for owner in [module, *classes]:
        parts = [_docstring(owner, seen)]
        parts += [
            f"{node.name}\n{text}"
            for node in owner.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (text := _docstring(node, seen))
        ]
        yield "\n\n".join(part for part in parts if part)


def _docstring(node: ast.AST, seen: set[str]) -> str:
    """The docstring, or nothing when it is absent or was met before."""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
    if text in seen:
        return ""
    seen.add(text)
    return text


class BuiltinSource:
    """The built-in corpus as a source of documents: one block of one file."""

    def identity(self) -> State:
        """Its size and digest: both differ between Python versions."""
        documents = builtin_documents()
        digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        return {"documents": len(documents), "digest": digest}

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """One shuffled epoch; see `shuffled_documents`."""
        return shuffled_documents([self], seed, epoch, state)

    def blocks(self, start: int, *key: int) -> Iterator[tuple[str, ...]]:
        """See `BlockFile`."""
        if start == 0:
            yield builtin_documents()
