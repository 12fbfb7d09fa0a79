"""Run files: every mistake is named with its key and mend, and what is written is read back equal."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from ronna.base.config import Config, apply_sets, build, config_hash, dump_toml, read_toml
from ronna.base.errors import RonnaError


class Causal(Config):
    kind: Literal["clm"] = "clm"
    z_loss: float = 0.0


class Masked(Config):
    kind: Literal["mlm"] = "mlm"
    rate: float = Field(default=0.15, gt=0, lt=1)
    span: int | Literal["whole_word"] = 1


Objective = Annotated[Causal | Masked, Field(discriminator="kind")]


@dataclass(frozen=True)
class Norm:
    eps: float = 1e-5


class Train(Config):
    lr: float = Field(default=1e-4, gt=0)
    steps: int
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = None
    compile: bool = False
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"

    @model_validator(mode="after")
    def _order(self) -> "Train":
        if self.betas[0] > self.betas[1]:
            raise ValueError("the first beta is above the second")
        return self


class Run(Config):
    train: Train
    objective: Objective = Causal()
    mixture: tuple[Objective, ...] = ()
    extras: dict[str, Masked] = Field(default_factory=dict)
    norm: Norm = Norm()
    out: Path = Path("out")


def mistakes(tree: dict) -> str:
    with pytest.raises(RonnaError) as caught:
        build(Run, tree, "run.toml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"train.lrr": 1}, "run.toml: train.lrr: unknown key\n  fix: did you mean train.lr?"),
        ({"schedule": 1}, "schedule: unknown key\n  fix: did you mean train.schedule?"),
        ({"train.zzz": 1}, "fix: known keys here: lr, steps, betas, clip, compile, schedule"),
        ({"objective.kind": "mln"}, 'objective.kind: unknown kind "mln"\n  fix: did you mean "mlm"?'),
        ({"objective.kind": "q"}, 'fix: it should be one of: "clm", "mlm"'),
        ({"objective.rate": 0.2}, 'no key of this kind of objective\n  fix: set objective.kind = "mlm"'),
        ({"objective": {"kind": "mlm", "z_loss": 0.1}}, 'fix: set objective.kind = "clm"'),
        (
            {"objective": {"kind": "mlm", "rat": 1}},
            "objective.rat: unknown key\n  fix: did you mean objective.rate?",
        ),
        ({"mixture": [{"kind": "clm"}, {"kind": "mlm", "rat": 1}]}, "fix: did you mean mixture.1.rate?"),
        ({"extras.a.rat": 1}, "extras.a.rat: unknown key\n  fix: did you mean extras.a.rate?"),
        ({"norm.epz": 1}, "norm.epz: unknown key\n  fix: did you mean norm.eps?"),
        ({"norm.eps": "x"}, 'norm.eps: found "x"\n  fix: it should be a valid number'),
        (
            {"extras.a.span": "word"},
            'extras.a.span: found "word"\n  fix: it should be a valid integer or one of: "whole_word"',
        ),
        ({"train.steps": True}, "train.steps: found true\n  fix: it should be a valid integer"),
        ({"train.steps": "7"}, 'train.steps: found "7"\n  fix: it should be a valid integer'),
        ({"train.compile": 1}, "train.compile: found 1\n  fix: it should be true or false"),
        ({"train.lr": 0}, "train.lr: found 0\n  fix: it should be greater than 0"),
        ({"train.lr": float("nan")}, "train.lr: found NaN\n  fix: it should be a finite number"),
        ({"train": {}}, "train.steps: missing\n  fix: add train.steps = <int>"),
        ({"train": 3}, "train: found 3\n  fix: it should be a table"),
        ({"train.schedule": "cosin"}, 'train.schedule: found "cosin"\n  fix: did you mean "cosine"?'),
        ({"out": 7}, "out: found 7\n  fix: it should be a string, in quotes"),
        ({"train.betas": [0.9, 0.5]}, "run.toml: train: the first beta is above the second"),
        ({"train.betas": ["a", 0.5]}, 'train.betas.0: found "a"\n  fix: it should be a valid number'),
    ],
)
def test_one_mistake(extra, says):
    tree: dict = {"train": {"steps": 10}}
    for key, value in extra.items():
        *tables, name = key.split(".")
        table = tree
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = value
    assert says in mistakes(tree)


def test_all_mistakes_at_once():
    text = mistakes({"train": {"steps": "many", "lrr": 1}, "objective": {"kind": "mlm", "rate": 2}})
    assert text.startswith("run.toml: 3 mistakes\n")
    assert 'train.steps: found "many"; it should be a valid integer' in text
    assert "train.lrr: unknown key; did you mean train.lr?" in text
    assert "objective.rate: found 2; it should be less than 1" in text


class Whole(Config):
    run: Run
    objective: Objective
    name: str
    files: tuple[str, ...]


def test_of_a_missing_table_the_keys_that_have_no_default_are_named():
    with pytest.raises(RonnaError) as caught:
        build(Whole, {}, "whole.toml", {"files": "give --files (texts)"})
    for line in (
        "run.train.steps: missing; add run.train.steps = <int>",
        'objective.kind: missing; add objective.kind = "clm" or "mlm"',
        'name: missing; add name = "..."',
        "files: missing; give --files (texts)",
    ):
        assert f"\n    {line}\n" in str(caught.value)
    with pytest.raises(RonnaError, match=r'add files = \["\.\.\."\]'):
        build(Whole, {"run": {"train": {"steps": 1}}, "objective": {"kind": "clm"}, "name": "a"}, "whole.toml")


def test_frozen_and_none_by_default():
    config = Train(steps=1)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 2  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"Bad\.clip admits None, so None must be its default"):
        type("Bad", (Config,), {"__annotations__": {"clip": float | None}, "clip": 1.0})


@given(
    lr=st.floats(min_value=1e-300, max_value=1e300),
    steps=st.integers(-(2**63), 2**63 - 1),
    clip=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    out=st.text(st.characters(exclude_categories=["C"])).map(Path),
    rate=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_round_trip(tmp_path_factory, lr, steps, clip, out, rate):
    run = Run(
        train=Train(lr=lr, steps=steps, clip=clip, betas=(rate, 1.0)),
        objective=Masked(rate=rate, span="whole_word"),
        mixture=(Masked(span=3), Causal()),
        extras={"a.b": Masked(rate=rate)},
        norm=Norm(rate),
        out=out,
    )
    path = tmp_path_factory.getbasetemp() / "run.toml"
    path.write_text(dump_toml(run), encoding="utf-8")
    again = build(Run, read_toml(path), "run.toml")
    assert again == run
    assert config_hash(again) == config_hash(run)


def test_hash_is_of_the_content():
    run = Run(train=Train(steps=3, lr=1e-5))
    assert config_hash(run).startswith("56c901b93860788b")
    assert config_hash(run) != config_hash(Run(train=Train(steps=3, lr=1.1e-5)))


@pytest.mark.parametrize(
    ("data", "line", "says"),
    [
        (b"a = 1\nb = \n", 2, "not TOML"),
        (b"a = 1\na = 2\n", 2, "not TOML"),
        (b"a = 1\nb = [1,\n", 3, "not TOML"),
        (b"a = 1\nb = '\xff'\n", 2, "byte 0xff is not utf-8"),
    ],
)
def test_unreadable_toml_is_named_by_line(tmp_path, data, line, says):
    path = tmp_path / "run.toml"
    path.write_bytes(data)
    with pytest.raises(RonnaError) as caught:
        read_toml(path)
    assert str(caught.value).startswith(f"{path}:{line}: {says}")
    assert "(at " not in str(caught.value)


def test_read_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\r\nlr = 1e-5\r\n")
    assert read_toml(path) == {"train": {"lr": 1e-5}}
    with pytest.raises(RonnaError, match="No such file"):
        read_toml(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("train.lr=1e-4", {"train": {"lr": 1e-4, "clip": 1.0}, "mixture": [{"w": 1}]}),
        ("train.name=bert base", {"train": {"clip": 1.0, "name": "bert base"}, "mixture": [{"w": 1}]}),
        ("name=2026-01-31", {"train": {"clip": 1.0}, "mixture": [{"w": 1}], "name": "2026-01-31"}),
        ('name="7"', {"train": {"clip": 1.0}, "mixture": [{"w": 1}], "name": "7"}),
        ("name=a=b", {"train": {"clip": 1.0}, "mixture": [{"w": 1}], "name": "a=b"}),
        ("name=1\nx = 2", {"train": {"clip": 1.0}, "mixture": [{"w": 1}], "name": "1\nx = 2"}),
        ("betas=[0.9, 1]", {"train": {"clip": 1.0}, "mixture": [{"w": 1}], "betas": [0.9, 1]}),
        ("mixture.0.w=2", {"train": {"clip": 1.0}, "mixture": [{"w": 2}]}),
        ("mixture.0={w=3}", {"train": {"clip": 1.0}, "mixture": [{"w": 3}]}),
        ("train.clip=", {"train": {}, "mixture": [{"w": 1}]}),
    ],
)
def test_set(text, tree):
    before = {"train": {"clip": 1.0}, "mixture": [{"w": 1}]}
    assert apply_sets(before, [text]) == tree
    assert before == {"train": {"clip": 1.0}, "mixture": [{"w": 1}]}


@pytest.mark.parametrize("text", ["lr", "=1", "a..b=1", "a b=1", "lr.x=1", "mixture.3.w=1", "mixture.3=1", "absent="])
def test_bad_set_shows_how(text):
    with pytest.raises(RonnaError) as caught:
        apply_sets({"lr": 1, "mixture": [{}]}, [text])
    assert caught.value.where == f"--set {text}"
    assert caught.value.fix


def test_needs_no_torch():
    code = "import ronna.base.config, ronna.base.track, ronna.base.device, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0


class Adam(Config):
    kind: Literal["adam"] = "adam"
    lr: float = 1.0
    decay: float = 0.5


class Sgd(Config):
    kind: Literal["sgd"] = "sgd"
    lr: float = 2.0


class Settings(Config):
    optim: Annotated[Adam | Sgd, Field(discriminator="kind")] = Adam(lr=3.0, decay=0.7)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"lr": 5.0}, Adam(lr=5.0, decay=0.7)),
        ({"kind": "adam"}, Adam(lr=3.0, decay=0.7)),
        ({"kind": "sgd"}, Sgd()),
        ({"kind": "sgd", "lr": 5.0}, Sgd(lr=5.0)),
    ],
)
def test_a_table_in_part_keeps_the_rest_of_its_default(given, wanted):
    assert build(Settings, {"optim": given}, "run.toml").optim == wanted
