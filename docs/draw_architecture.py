"""`python -m docs.draw_architecture` draws docs/images/architecture.svg from the code's imports.

The rows are the layers of pyproject.toml's contract, the arrows what the packages import. An arrow
that follows from others (A to C, where A to B and B to C are drawn) is left out. All of them are
written beside the picture as JSON, which tests/test_architecture.py holds against the code.
"""

import ast
import json
import re
import textwrap
import tomllib
from collections.abc import Collection
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/images/architecture.svg"
EDGES = PICTURE.with_suffix(".json")

Edge = tuple[str, str]
"""importer and imported, each a module or package directly in hamner"""

WIDTH, HEIGHT, ROW = 2.2, 0.66, 1.06
"""size of a box and the distance from one layer to the next, in inches"""
KERNELS_ROW = 4
"""where the kernels stand: apart from the layers, at the height of the model"""
ACROSS = {
    "sft": 0.0,
    "profile": 2.3,
    "chat": 4.6,
    "evaluate": 9.2,
    "plot": 6.9,
    "export": 9.2,
    "train": 1.4,
    "checkpoint": 3.6,
    "model": 4.9,
    "kernels": 8.9,
    "parallel": 4.9,
    "data": 7.5,
    "plan": 2.3,
    "config": 5.6,
    "hardware": 1.0,
    "progress": 7.6,
    "cli": 6.2,
    "files": 8.9,
    "errors": 3.5,
}
"""where the middle of each box is, in inches from the left"""


def read_imports() -> list[Edge]:
    """The function reads which of hamner's packages import which, in any module or function."""
    graph = grimp.build_graph("hamner", cache_dir=None)
    packages = graph.find_children("hamner")
    return sorted(
        (importer.removeprefix("hamner."), imported.removeprefix("hamner."))
        for importer in packages
        for imported in packages - {importer}
        if graph.direct_import_exists(importer=importer, imported=imported, as_packages=True)
    )


def read_layers() -> list[list[str]]:
    """The function reads the layers from pyproject.toml's contract, the highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in settings["contracts"] if c["id"] == "layers")
    return [re.split(r"\s*[|:]\s*", layer) for layer in contract["layers"]]


def without_detours(edges: Collection[Edge]) -> list[Edge]:
    """The function leaves out every edge that a longer way through other edges implies."""

    def is_reached(start: str, end: str) -> bool:
        ahead = [b for a, b in edges if a == start and b != end]
        seen = set(ahead)
        while ahead:
            found = {b for a, b in edges if a == ahead[-1]} - seen - {start}
            ahead.pop()
            seen |= found
            ahead += found
        return end in seen

    return [edge for edge in edges if not is_reached(*edge)]


def summary_of(package: str) -> str:
    """The function reads the first paragraph of a package's or module's docstring."""
    folder = ROOT / ("kernels" if package == "kernels" else f"hamner/{package}")
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def place_boxes(layers: list[list[str]]) -> dict[str, tuple[float, float]]:
    """The function gives each package the middle of its box: its layer says how high it is."""
    rows = {package: row for row, layer in enumerate(layers) for package in layer}
    rows["kernels"] = KERNELS_ROW
    return {package: (ACROSS[package], -ROW * row) for package, row in rows.items()}


def draw(edges: list[Edge], layers: list[list[str]], path: Path) -> None:
    """The function draws one box for each package and one arrow for each edge that is shown."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    places = place_boxes(layers)
    with rc_context({"svg.hashsalt": "hamner", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 9.6), layout="constrained")
        axes = figure.add_subplot()
        for importer, imported in without_detours(edges):
            (x, y), (to_x, to_y) = places[importer], places[imported]
            side = (to_x > x) - (to_x < x) if y == to_y else 0
            axes.annotate(
                "",
                xy=(to_x - side * WIDTH / 2, to_y + (not side) * HEIGHT / 2),
                xytext=(x + side * WIDTH / 2, y - (not side) * HEIGHT / 2),
                arrowprops={"arrowstyle": "-|>", "color": "#667788", "shrinkA": 0, "shrinkB": 0},
                zorder=1,
            )
        for package, (x, y) in places.items():
            colour = "#ffe8c7" if package == "kernels" else "#dcebf7"
            corner = (x - WIDTH / 2, y - HEIGHT / 2)
            style = {"boxstyle": "round,pad=0,rounding_size=0.06", "ec": "#445566", "fc": colour}
            axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, zorder=2, **style))
            summary = textwrap.shorten(summary_of(package), 96, placeholder=" ...")
            axes.text(x, y + 0.13, package, weight="bold", size=11, ha="center", zorder=3)
            wrapped = textwrap.fill(summary, 37)
            axes.text(x, y + 0.08, wrapped, size=6.5, ha="center", va="top", zorder=3)
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.autoscale_view()
        figure.savefig(
            path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None
        )


def main() -> None:
    """The command writes the picture and the edges beside it."""
    edges = read_imports()
    PICTURE.parent.mkdir(exist_ok=True)
    EDGES.write_text(json.dumps(edges).replace("], [", "],\n [") + "\n")
    draw(edges, read_layers(), PICTURE)
    print(f"wrote {PICTURE.relative_to(ROOT)} and {EDGES.name}: {len(edges)} edges")


if __name__ == "__main__":
    main()
