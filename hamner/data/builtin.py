"""The built-in corpus is the English that every Python installation carries, read offline.

It is the topics of `pydoc` and the docstrings of the standard library, which is parsed, never
imported, so that reading it runs none of its code. Which documents there are depends on the
Python version, their order does not depend on anything.
"""

import ast
import hashlib
import inspect
import itertools
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hamner.data.documents import Extent
from hamner.data.shuffle import State, shuffled_documents
from hamner.errors import UserError

#: Parts of the standard library without prose, or with someone else's: tests, the editor and its
#: demos, grammar tables, the vendored installer.
SKIPPED = frozenset(
    {"__phello__", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests"}
    | {"turtledemo"}
)
#: Shorter documents (a lone "Return self.") teach nothing.
MIN_CHARACTERS = 80
#: A longer text is cut between paragraphs into documents of about this size. A batch of many short
#: documents is a better sample of the corpus than one that a single topic fills: the smallest
#: option sees eight rows a step.
DOCUMENT_CHARACTERS = 1_000

#: Where statements hold statements.
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")


@cache
def builtin_documents() -> tuple[str, ...]:
    """The documents of the corpus are topics and docstrings, the long ones in pieces.

    Raises:
        UserError: this Python carries neither the topics nor the library's sources.
    """
    texts = itertools.chain(_topics(), _docstrings())
    unique = dict.fromkeys(piece for text in texts for piece in _pieces(text))
    documents = tuple(piece for piece in unique if len(piece) >= MIN_CHARACTERS)
    if not documents:
        raise UserError(
            "--data builtin: this Python installation carries neither pydoc topics nor the "
            "standard library's sources; give a file or folder of text instead"
        )
    return documents


def _pieces(text: str) -> Iterator[str]:
    """The pieces are the text, cut between paragraphs."""
    piece: list[str] = []
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name].strip() for name in sorted(topics)]


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        package = library / name
        paths = sorted(package.rglob("*.py")) if package.is_dir() else [library / f"{name}.py"]
        for path in paths:
            if path.is_file() and SKIPPED.isdisjoint(path.relative_to(library).parts):
                yield from _module_documents(path)


def _module_documents(path: Path) -> Iterator[str]:
    """The docstrings of the module, its classes and functions are a document each."""
    try:
        module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # some distributions keep templates and odd encodings there
    nodes: deque[ast.AST] = deque([module])
    while nodes:  # in the order of `ast.walk`, without expressions: most nodes, and none has any
        node = nodes.popleft()
        for block in BLOCKS:
            nodes.extend(getattr(node, block, ()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()


class BuiltinSource:
    """The built-in corpus is a source of documents: one block of one file."""

    def identity(self) -> State:
        """The size and the digest differ between Python versions."""
        documents = builtin_documents()
        digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        return {"documents": len(documents), "digest": digest}

    def extent(self, seed: int, epoch: int, state: State | None) -> Extent:
        """The extent counts documents."""
        return Extent(state["row"] if state else 0, len(builtin_documents()), "documents")

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """The epoch is shuffled; see `shuffled_documents`."""
        return shuffled_documents([self], seed, epoch, state)

    def blocks(self, start: int, *key: int) -> Iterator[tuple[str, ...]]:
        """The block holds every document; see `BlockFile`."""
        if start == 0:
            yield builtin_documents()
