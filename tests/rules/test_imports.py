"""Imports run downwards only, without circles, and torch stays out of the rooms that do without it."""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

# Lowest first; the rooms of one level do not know each other.
LEVELS = [
    {"base"},
    {"text", "model.config"},
    {"model", "data"},
    {"decoding"},
    {"objectives", "tasks", "peft", "compress", "parallel", "plan"},
    {"plots", "pages"},
    {"report"},
    {"train", "serve", "evaluate"},
]
# run, cli and whatever else lies beside them: they may use each other and everything but the apps.
TOP, APPS = len(LEVELS), len(LEVELS) + 1
CLOSED_FORMS = {
    f"ronna.plan.{name}"
    for name in "hardware memory time work search stretches blocks layers ends inputs weights shapes tape heap".split()
}
NO_TORCH = ("ronna.base", "ronna.text", "ronna.model.config", "ronna.data.sources", "ronna.data.shards",
            "ronna.data.packing", *CLOSED_FORMS)  # fmt: skip


def room_of(name):
    inner = name.removeprefix("ronna").removeprefix(".")
    below_config = inner == "model.config" or inner.startswith("model.config.")
    return "model.config" if below_config else inner.partition(".")[0]


def level_of(room):
    known = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
    return APPS if room == "apps" else known.get(room, TOP)


def imports_of(module, modules):
    """The modules of the package that this one imports, inside functions too."""

    def known(name):
        while name not in modules and "." in name:
            name = name.rpartition(".")[0]
        return name

    above = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (known(alias.name) for alias in node.names if alias.name.partition(".")[0] == "ronna")
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(above[: len(above) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (prefix, node.module)))
            if source.partition(".")[0] == "ronna":
                targets = {known(f"{source}.{alias.name}"): alias.name for alias in node.names}
                yield from (target for target, name in targets.items() if (target, name) != ("ronna", "__version__"))


def upward(modules):
    """Each forbidden import as `importer -> imported`."""
    for module in modules.values():
        room = room_of(module.name)
        for target in imports_of(module, modules):
            other = room_of(target)
            down = level_of(other) < level_of(room) or level_of(other) == level_of(room) == TOP
            allowed = room == other or down or (room == "tasks" and target == "ronna.objectives.base")
            if module.name in CLOSED_FORMS:
                allowed = other in ("base", "model.config", "plan")
            if not allowed:
                yield f"{module.name} -> {target}"


def circle(modules):
    """The modules of one import circle in order, empty when there is none."""
    graph = {name: set(imports_of(module, modules)) - {name} for name, module in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_run_downwards(modules):
    assert not sorted(upward(modules))


def test_no_import_circles(modules):
    assert not circle(modules)


@pytest.mark.parametrize(
    ("importer", "statement", "forbidden"),
    [
        ("base/track.py", "import ronna.train.loop", True),
        ("base/track.py", "def f():\n    from ronna.train import loop", True),
        ("base/track.py", "from ..train.loop import fit", True),
        ("base/track.py", "from ronna import train", True),
        ("base/track.py", "from ronna import __version__", False),
        ("model/config.py", "from ronna.model.layers import Norm", True),
        ("model/config.py", "from . import layers", True),
        ("model/layers.py", "from ronna.model.config import Model", False),
        ("text/clean.py", "from ronna.model import config", True),
        ("data/loader.py", "from ronna.model import config", False),
        ("data/loader.py", "from ronna.model import layers", True),
        ("tasks/classify.py", "from ronna.objectives.base import Loss", False),
        ("tasks/classify.py", "from ronna.objectives import clm", True),
        ("plan/memory.py", "from ronna.model.config import params", False),
        ("plan/memory.py", "from ronna.model.layers import Norm", True),
        ("plan/probe.py", "from ronna.model.layers import Norm", False),
        ("train/loop.py", "from ronna.objectives.clm import CLM", False),
        ("train/loop.py", "from ronna.run import Run", True),
        ("newcomer.py", "import ronna.run", False),
        ("train/loop.py", "import ronna.newcomer", True),
        ("run.py", "import ronna.apps", True),
        ("train/loop.py", "import torch", False),
    ],
)
def test_the_rule_sees_a_violation(tree_of, importer, statement, forbidden):
    names = ("__init__ base/__init__ model/__init__ model/config model/layers train/__init__ train/loop run "
             "newcomer apps/__init__ objectives/__init__ objectives/base objectives/clm")  # fmt: skip
    modules = tree_of({**{f"{name}.py": "" for name in names.split()}, importer: statement})
    assert bool(list(upward(modules))) == forbidden


def test_the_rule_sees_a_circle(tree_of):
    sources = {"__init__.py": "", "a.py": "import ronna.b", "b.py": "def f():\n    from ronna.c import x"}
    assert not circle(tree_of({**sources, "c.py": ""}))
    assert set(circle(tree_of({**sources, "c.py": "from ronna import a"}))) == {
        "ronna.a",
        "ronna.b",
        "ronna.c",
    }


def test_torch_stays_out(repository, modules):
    bare = [name for name in modules if any(f"{name}.".startswith(f"{room}.") for room in NO_TORCH)]
    assert {"ronna.base.config", "ronna.base.errors"} <= set(bare)
    code = (
        "import importlib, sys\n"
        f"for name in {bare}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} imports torch')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
