"""The rooms: each imports only what stands above it in the list of the builders' page, and no file goes in a circle."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "diopt_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))


def rooms() -> list[str]:
    """The list of the builders' page, from the top."""
    page = (PACKAGE / "README.md").read_text(encoding="utf-8")
    found = re.search(r"## Rooms.*?```\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return [line.split()[0] for line in found.group(1).splitlines() if not line.startswith(" ")]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imported(path: Path, lazily: bool) -> set[str]:
    """The package's own modules that a file imports; also those within functions if asked for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if lazily else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            # What is imported from a room may itself be a module.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name.split(".")[0] == "diopt_lightning"}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "diopt_lightning"


def test_the_page_names_every_room():
    assert sorted(rooms()) == sorted({room_of(name) for name in MODULES} - {"diopt_lightning"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_stands_above_it(path):
    order, room = rooms(), room_of(module_of(path))
    if room == "diopt_lightning":  # the face, which imports modules and rooms when they are asked for
        assert imported(path, lazily=False) == {"diopt_lightning.errors"}
        return
    others = {room_of(name) for name in imported(path, lazily=True)} - {room}
    assert "diopt_lightning" not in others, "a room imports the package's face"
    assert all(order.index(other) < order.index(room) for other in others), (room, others)


def test_only_the_face_and_the_command_line_import_by_name():
    by_name = [path for path in FILES if "import_module" in path.read_text(encoding="utf-8")]
    assert [module_of(path) for path in by_name] == ["diopt_lightning", "diopt_lightning.cli"]


def test_no_file_goes_in_a_circle():
    graph = {module_of(path): imported(path, lazily=True) - {module_of(path)} for path in FILES}
    # A room's face imports its files, which import each other and not the face.
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_every_dependency_is_imported_or_says_who_needs_it():
    declared = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    lines = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    sources = "".join(path.read_text(encoding="utf-8") for path in FILES)
    modules = {"pyyaml": "yaml", "rouge-score": "rouge_score"}
    for requirement in declared:
        name = re.split(r"[\[>=<]", requirement)[0]
        if not re.search(rf"^\s*(import|from) {modules.get(name, name)}\b", sources, re.MULTILINE):
            (number,) = [number for number, line in enumerate(lines) if f'"{requirement}"' in line]
            assert "#" in lines[number] or "these two" in lines[number - 1], f"nothing here imports {name}"


def test_no_file_is_long_and_no_class():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 340, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno + 1 <= 250, f"{path}: {node.name}"
