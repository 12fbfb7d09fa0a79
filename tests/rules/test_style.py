"""The rules of the house that a machine can check, over the tree as it is."""

import ast
import re
import subprocess

import pytest

FILE_LINES, FUNCTION_LINES = 400, 60
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FAMILIES = {"bert", "roberta", "modernbert", "gpt2", "gpt", "llama", "qwen", "qwen2", "qwen3", "t5", "marian"}
# Written so that the patterns do not find themselves.
FORBIDDEN_TEXT = {
    "a machine's path": r"/(?:wor[k]|roo[t]|mn[t])/|/opt/(?:wheel|pyp[i])|/(?:hom[e]|User[s])/\w|:\\User",
    "a package registry": r"\b(?:pyp[i]|pythonhoste[d]|download\.pytorc[h]|anacond[a]|npmj[s])\.org\b"
    r"|\bghcr\.i[o]\b|\bdocker\.i[o]\b|\bindex-ur[l]\b|\bfind-link[s]\b",
}


def too_long(modules):
    for module in modules.values():
        if (lines := module.text.count("\n")) > FILE_LINES:
            yield f"{module.path}: {lines} lines"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    yield f"{module.path}:{node.lineno} {node.name}: {lines} lines"


def unpickling(modules):
    for module in modules.values():
        for node in ast.walk(module.tree):
            match node:
                case ast.Import(names=names):
                    bad = any(alias.name.partition(".")[0] in PICKLERS for alias in names)
                case ast.ImportFrom(module=str(source), names=names, level=0):
                    from_torch = source == "torch" and any(alias.name in ("load", "save") for alias in names)
                    bad = source.partition(".")[0] in PICKLERS or from_torch
                case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save"):
                    bad = True
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    bad = True
                case _:
                    bad = False
            if bad:
                yield f"{module.path}:{getattr(node, 'lineno', 0)}"


def names_compared(modules):
    """Where a family's name is compared with, outside of the families: a model is data, not a name."""
    for module in modules.values():
        room = module.name.split(".")[1:]
        shared = {"model", "peft", "compress", "parallel", "plan", "train"}
        if not room or room[0] not in shared or room[:2] == ["model", "families"]:
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Compare | ast.MatchValue):
                strings = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                if found := {text.lower() for text in strings} & FAMILIES:
                    yield f"{module.path}:{node.lineno} {', '.join(sorted(found))}"


def config_classes(modules):
    """The definitions of the pydantic configs, those that inherit from another one included."""
    classes = [node for m in modules.values() for node in ast.walk(m.tree) if isinstance(node, ast.ClassDef)]
    names, size = {"Config"}, 0
    while size < len(names):
        size = len(names)
        names |= {c.name for c in classes if names & {ast.unparse(b).rpartition(".")[2] for b in c.bases}}
    return [c for c in classes if c.name in names - {"Config"}]


def unread_fields(modules):
    """Fields that no line reads; declaring or checking one is not reading it. pydantic reads `kind`."""
    reads = set()
    for module in modules.values():
        nodes = list(ast.walk(module.tree))
        validators = [n for n in nodes if any("validator" in ast.unparse(d) for d in getattr(n, "decorator_list", ()))]
        checks = {id(inner) for validator in validators for inner in ast.walk(validator)}
        reads |= {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks
        }
    for node in config_classes(modules):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                key = ast.unparse(field.target)
                if key not in reads | {"kind", "model_config"}:
                    yield f"{node.name}.{key}"


def tracked_files(repository):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=repository, capture_output=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [repository / name for name in done.stdout.decode().split("\0") if name]


def test_lengths(repository, modules):
    everything = dict(modules)
    for folder in ("tests", "benchmarks"):
        for path in sorted((repository / folder).rglob("*.py")):
            everything[str(path)] = type(next(iter(modules.values())))(str(path), path, path.read_text("utf-8"))
    assert not list(too_long(everything))


def test_nothing_is_pickled(modules):
    assert not list(unpickling(modules))


def test_no_model_is_known_by_its_name(modules):
    assert not list(names_compared(modules))


def test_every_config_field_is_read(modules):
    assert not list(unread_fields(modules))


def test_no_machine_stands_in_the_text(repository):
    found = []
    for path in tracked_files(repository):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        for number, line in enumerate(lines, 1):
            found += [f"{path}:{number} {what}" for what, rule in FORBIDDEN_TEXT.items() if re.search(rule, line)]
    assert not found


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (too_long, "\n" * (FILE_LINES + 1)),
        (too_long, "class A:\n    async def f(self):\n" + "        x = 1\n" * FUNCTION_LINES),
        (unpickling, "def f():\n    import pickle"),
        (unpickling, "from joblib import load"),
        (unpickling, "import torch\nx = torch.load('a', weights_only=True)"),
        (unpickling, "from torch import load"),
        (unpickling, "import numpy as np\nx = np.load('a', allow_pickle=True)"),
        (names_compared, "def f(c):\n    return c.model_type == 'bert'"),
        (names_compared, "def f(c):\n    return c.name.lower() in ('x', 'Llama')"),
        (names_compared, "def f(c):\n    match c:\n        case 't5': return 1"),
        (unread_fields, "class A(Config):\n    lr: float = 1.0\n"),
        (unread_fields, "class A(base.Config):\n    pass\nclass B(A):\n    lr: float = 1.0\n"),
        (
            unread_fields,
            "class A(Config):\n    lr: float\n    @model_validator()\n    def f(self): self.lr\n",
        ),
        (unread_fields, "class A(Config):\n    lr: float\ndef f(a): a.lr = 1\n"),
    ],
)
def test_the_rules_see_a_violation(tree_of, rule, source):
    assert list(rule(tree_of({"model/part.py": source})))


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (too_long, "def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1)),
        (unpickling, "import torch, numpy as np\nx = np.load('a', allow_pickle=False)\ny = model.load('a')"),
        (names_compared, "NAME = 'bert'\ndef f(c):\n    return c.kind == 'rms'"),
        (
            unread_fields,
            "class A(Config):\n    kind: str = 'a'\n    lr: float = 1.0\ndef f(a): return a.lr\n",
        ),
    ],
)
def test_the_rules_see_no_violation(tree_of, rule, source):
    assert not list(rule(tree_of({"model/part.py": source})))


@pytest.mark.parametrize("text", ["cd /wor" + "k/main", "/hom" + "e/me/x", "pip -i https://pyp" + "i.org/simple"])
def test_the_text_rule_sees_a_violation(text):
    assert any(re.search(rule, text) for rule in FORBIDDEN_TEXT.values())
