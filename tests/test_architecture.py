"""These tests hold the project's shape: who imports whom, how large a piece may be."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

from docs.draw_architecture import EDGES, read_imports, summary_of

ROOT = Path(__file__).parents[1]
LIMITS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hamner"]["limits"]

Function = ast.FunctionDef | ast.AsyncFunctionDef
Rule = Callable[[ast.Module], Iterator[tuple[ast.AST, str]]]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

NAMELESS = {"apply", "save_for_backward", "mark_non_differentiable", "print", "zip", "chain"}
NAMELESS |= {"product", "min", "max", "submit", "debug", "info", "warning", "error"}
NAMELESS |= {"permutation", "check_counts", "grid", "run_block", "_recomputed"}  # variadic
NAMELESS |= {"launch_backward"}  # starred
NAMELESS |= {"adamw", "flash_attn_varlen_func", "create_block_mask"}  # of other projects
"""functions whose arguments have no names or are all alike, and those that pass theirs on"""


@cache
def parsed_files() -> dict[str, ast.Module]:
    """The function parses every file that the limits hold for, by its path in the project."""
    folders = ("kernels", "hamner", "bench", "docs")
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    names = {path.relative_to(ROOT).as_posix(): path for path in paths}
    return {
        name: ast.parse(path.read_text())
        for name, path in names.items()
        if not name.startswith("hamner/kernels/")  # the link to kernels/
    }


def is_kernel(node: ast.AST) -> bool:
    """The function says whether a node is a function that Triton compiles."""
    return isinstance(node, FUNCTION) and any(
        "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def is_table(node: ast.ClassDef) -> bool:
    """The function says whether a class only declares frozen fields, such as a command's flags."""
    return any("frozen=True" in ast.unparse(decorator) for decorator in node.decorator_list)


def nodes_outside_kernels(root: ast.AST) -> Iterator[ast.AST]:
    """The function yields every node below a root, but nothing of Triton's kernels."""
    for child in ast.iter_child_nodes(root):
        if not is_kernel(child):
            yield child
            yield from nodes_outside_kernels(child)


def long_functions(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """The rule finds functions with more lines than allowed, from `def` to the end."""
    for node in nodes_outside_kernels(tree):
        if isinstance(node, FUNCTION):
            lines = node.end_lineno - node.lineno + 1
            if lines > LIMITS["function-lines"]:
                yield node, f"{node.name}: {lines} lines"


def large_classes(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """The rule finds classes with more methods or more attributes than allowed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, FUNCTION)]
            attributes = {name for method in methods for name in attributes_set_in(method)}
            if not is_table(node):
                attributes |= {
                    child.target.id
                    for child in node.body
                    if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)
                }
            if len(methods) > LIMITS["class-methods"]:
                yield node, f"{node.name}: {len(methods)} methods"
            if len(attributes) > LIMITS["class-attributes"]:
                yield node, f"{node.name}: {len(attributes)} attributes"


def attributes_set_in(method: Function) -> Iterator[str]:
    """The function yields the names that a method assigns to on `self`."""
    for node in ast.walk(method):
        is_stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if is_stored and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr


def nameless_calls(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """The rule finds calls with more positional arguments than allowed, but in functions only.

    Rows of a module's tables and launches of kernels (`kernel[grid](...)`) are free.
    """
    functions = [node for node in nodes_outside_kernels(tree) if isinstance(node, FUNCTION)]
    calls = {
        node: None
        for function in functions
        for node in nodes_outside_kernels(function)
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Subscript)
    }
    for call in calls:
        name = ast.unparse(call.func).rpartition(".")[2]
        if len(call.args) > LIMITS["positional-arguments"] and name not in NAMELESS:
            yield call, f"{name}: {len(call.args)} positional arguments"


def broken_docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """The rule finds docstrings whose first paragraph does not begin or end as a sentence does.

    What `/help` of the chat prints begins with the name of a command, such as `/temp`.
    """
    for node in (tree, *ast.walk(tree)):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTION)):
            first = (ast.get_docstring(node) or "").split("\n\n")[0]
            if first and not re.fullmatch(r"[A-Z`\"'0-9/].*[.:?!]", first, re.DOTALL):
                yield node, f"{getattr(node, 'name', 'module')}: {first[:40]!r}"


def violations_of(rule: Rule) -> list[str]:
    """The function lists what a rule finds in all files, each with its place."""
    return [
        f"{file}:{getattr(node, 'lineno', 1)} {what}"
        for file, tree in parsed_files().items()
        for node, what in rule(tree)
    ]


@pytest.mark.parametrize("rule", [long_functions, large_classes, nameless_calls, broken_docstrings])
def test_nothing_exceeds_the_limits(rule):
    assert violations_of(rule) == []


def test_the_contracts_hold():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_kernels_need_torch_and_triton_alone():
    graph = grimp.build_graph("hamner", include_external_packages=True, cache_dir=None)
    kernels = graph.find_descendants("hamner.kernels")
    imported = {
        name.partition(".")[0]
        for kernel in kernels
        for name in graph.find_modules_directly_imported_by(kernel)
    }
    assert kernels
    assert imported - sys.stdlib_module_names == {"hamner", "torch", "triton"}


def test_the_picture_shows_what_the_code_imports():
    drawn = [tuple(edge) for edge in json.loads(EDGES.read_text())]
    assert drawn == read_imports(), "draw it again: python -m docs.draw_architecture"
    assert all(summary_of(package) for edge in drawn for package in edge)
