"""The source tree as the rules see it: parsed once, never imported."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Module:
    """One file of a tree of modules, by its dotted name."""

    name: str
    path: Path
    text: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))


def read_modules(root: Path) -> Iterator[Module]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        yield Module(name, path, path.read_text(encoding="utf-8"), is_package)


@pytest.fixture(scope="session")
def modules(repository: Path) -> dict[str, Module]:
    """Every module of src/ronna by name."""
    return {module.name: module for module in read_modules(repository / "src" / "ronna")}


@pytest.fixture
def tree_of(tmp_path: Path):
    """Makes the modules of a synthetic package from {path below ronna/: source}."""

    def make(sources: dict[str, str]) -> dict[str, Module]:
        for name, text in sources.items():
            path = tmp_path / "ronna" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return {module.name: module for module in read_modules(tmp_path / "ronna")}

    return make
