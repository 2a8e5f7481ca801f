"""The imports of the project as a graph between its places, and the rules that this graph must keep.

A place is a package or a module directly inside dist_t2i, or one of the folders slurm and tools. `LADDER` lists the
places from the ground up. Imports inside functions count like those at the top of a file.

    python tests/support/architecture.py      write docs/architecture.svg anew, and print how many imports there are
"""

from __future__ import annotations

import ast
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dist_t2i", "slurm", "tools")
PICTURE = ROOT / "docs" / "architecture.svg"
LADDER: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("utils",),
    ("storage", "models"),
    ("config",),
    ("data", "distributed", "reporting"),
    ("losses", "checkpoint", "sharding"),
    ("inference",),
    ("eval",),
    ("training", "publish", "ablation"),
    ("train",),
    ("slurm",),
    ("cli",),
    ("tools",),
)
"""Places from the ground up: each may import those of earlier rows only."""
PLACES = tuple(place for row in LADDER for place in row)
_LEVEL = {place: level for level, row in enumerate(LADDER) for place in row}
EXCEPTIONS = {("dist_t2i", "dist_t2i.inference.pipeline")}
"""(importing module, imported module): `dist_t2i.load` is imported when it is first used."""
ONLY_FROM = {
    "dist_t2i.distributed.engine": ("training", "tools"),
    "dist_t2i.distributed": ("checkpoint", "training", "ablation", "train", "slurm", "cli", "tools", "losses"),
}
"""Module or package -> places that may import it."""
FORBIDDEN_LIBRARIES = {
    "deepspeed": ("distributed",),
    "wandb": ("reporting",),
    "submitit": ("slurm", "sharding", "cli"),
}
"""Library -> places that may import it."""


class Import(NamedTuple):
    """One import statement's target."""

    importer: str
    imported: str
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.importer} imports {self.imported}"


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file, relative to `root`; a package has the name of its folder."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            found[".".join(relative.with_suffix("").parts).removesuffix(".__init__")] = relative
    return found


def place_of(module: str) -> str:
    """The place that a module belongs to; `dist_t2i` itself for the package's own `__init__`."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] or first if first == "dist_t2i" else first


def imports(root: Path = ROOT) -> list[Import]:
    """Every import of the project's own modules and of libraries, anywhere in a file."""
    known = modules(root)
    return [found for name, path in known.items() for found in _imports(name, path, root, known)]


def _imports(name: str, path: Path, root: Path, known: dict[str, Path]) -> Iterator[Import]:
    for module, names, line in _statements((root / path).read_text(encoding="utf-8")):
        parts = [f"{module}.{name}" for name in names]
        targets = [part if part in known else module for part in parts] or [module]
        for target in dict.fromkeys(targets):
            yield Import(name, target, path, line)


@functools.cache
def _statements(source: str) -> list[tuple[str, tuple[str, ...], int]]:
    """Module, imported names (none for `import module`) and line of each import of a file."""
    found: list[tuple[str, tuple[str, ...], int]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, (), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, tuple(alias.name for alias in node.names), node.lineno))
    return found


def imports_name(path: Path, package: str, name: str) -> bool:
    """Whether a file of the project imports `name` from a package or from one of the package's modules."""
    statements = _statements((ROOT / path).read_text(encoding="utf-8"))
    return any(name in names and f"{module}.".startswith(f"{package}.") for module, names, _ in statements)


def own(found: list[Import]) -> list[Import]:
    """The imports of the project's own modules across places."""
    return [
        one
        for one in found
        if one.imported.partition(".")[0] in FOLDERS and place_of(one.importer) != place_of(one.imported)
    ]


def violations(found: list[Import]) -> list[str]:
    """Violations of the rules, one line each: imports that do not point down, and imports that are not allowed here."""
    lines = []
    for one in own(found):
        importer, imported = place_of(one.importer), place_of(one.imported)
        if (one.importer, one.imported) in EXCEPTIONS or imported == "dist_t2i":
            continue
        if importer not in _LEVEL or imported not in _LEVEL:
            lines.append(f"{one}: {importer if importer not in _LEVEL else imported} is on no step of the ladder")
        elif _LEVEL[importer] <= _LEVEL[imported]:
            lines.append(f"{one}: {importer} may not import {imported}")
        for module, places in ONLY_FROM.items():
            if (one.imported + ".").startswith(module + ".") and importer not in places:
                lines.append(f"{one}: only {', '.join(places)} may import {module}")
        if importer == "losses" and imported == "distributed" and one.imported != "dist_t2i.distributed.collectives":
            lines.append(f"{one}: losses may import dist_t2i.distributed.collectives at most")
    for one in found:
        places = FORBIDDEN_LIBRARIES.get(one.imported.partition(".")[0])
        if places is not None and place_of(one.importer) not in places:
            lines.append(f"{one}: only {', '.join(places)} may import {one.imported}")
    return lines


def circles(found: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan 1972: strongly connected components)."""
    graph: dict[str, set[str]] = defaultdict(set)
    for one in found:
        if one.imported.partition(".")[0] in FOLDERS:
            graph[one.importer].add(one.imported)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return groups


def arrows(found: list[Import]) -> Counter[tuple[str, str]]:
    """(importing place, imported place) -> number of import statements."""
    pairs = ((place_of(one.importer), place_of(one.imported)) for one in own(found))
    return Counter(pair for pair in pairs if "dist_t2i" not in pair)


def files_of_packages(root: Path = ROOT) -> Counter[str]:
    """Folder of a package -> number of its own files."""
    return Counter(path.parent.as_posix() for path in modules(root).values())


def picture(pairs: Counter[tuple[str, str]]) -> str:
    """The ladder as a matrix in SVG: a dot in row A and column B says that A imports B; no dot lies above the diagonal."""
    cell, left, top = 22, 110, 110
    size = cell * len(PLACES)
    rows = PLACES[::-1]  # tools at the top, errors at the bottom, like the ladder
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + size + 10} {top + size + 10}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, place in enumerate(rows):
        y, x = top + cell * number, left + cell * (len(PLACES) - 1 - number)
        out.append(f'<rect x="{left}" y="{y}" width="{size}" height="{cell}" fill="{_shade(place)}"/>')
        out.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{place}</text>')
        out.append(f'<text transform="translate({x + 15},{top - 8}) rotate(-60)">{place}</text>')
        out.append(f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="#888"/>')
    for importer, imported in sorted(pairs):
        x = left + cell * PLACES.index(imported) + cell // 2
        y = top + cell * rows.index(importer) + cell // 2
        out.append(f'<circle cx="{x}" cy="{y}" r="5" fill="#1f5fa8"><title>{importer} → {imported}</title></circle>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _shade(place: str) -> str:
    return ("#f3f5f8", "#ffffff")[_LEVEL[place] % 2]


if __name__ == "__main__":
    everything = imports()
    PICTURE.write_text(picture(arrows(everything)), encoding="utf-8")
    print(f"{len(arrows(everything))} imports between {len(PLACES)} places; {PICTURE.relative_to(ROOT)} is written")
