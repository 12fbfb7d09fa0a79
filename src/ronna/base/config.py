"""TOML <-> frozen pydantic models: read, override with `--set`, check, write back, hash. No torch here."""

import copy
import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from ronna.base.errors import RonnaError

Tree = dict[str, Any]
C = TypeVar("C", bound=BaseModel)

_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")
_SET_EXAMPLE = "write --set key.path=value, for example --set train.lr=1e-4"
# pydantic speaks of Python's types; a run file has TOML's.
_TOML_NAMES = {
    "string_type": "a string, in quotes",
    "bool_type": "true or false",
    "list_type": "a list, [..., ...]",
    "tuple_type": "a list, [..., ...]",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "a table"),
}
# What stands for a value that nobody has given yet.
_PLACES = {str: '"..."', tuple: '["..."]'}


def one_or_more(value: Any) -> Any:
    """For a BeforeValidator of names: one of them is a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Config(BaseModel):
    """One table of a run file: frozen; unknown keys, nan and inf are refused.

    TOML has no null, so a field is left out when it is None. A field that admits None must therefore
    have None as its default, or it would not survive being written and read: TypeError at the class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def suggested(cls, tree: Tree) -> Tree:
        """`tree` with what a user would want who left it out and said what is there; a table overrides this."""
        return tree

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            admits_none = NoneType in _members(field.annotation)
            if admits_none and (field.is_required() or field.get_default(call_default_factory=False) is not None):
                raise TypeError(f"{cls.__name__}.{name} admits None, so None must be its default")


def read_toml(path: str | Path) -> Tree:
    """The tables of a TOML file (utf-8, byte order mark or not). RonnaError with path:line on a mistake."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RonnaError(
            f"cannot be read: {error.strerror}", where=str(path), fix="give the path of a TOML file"
        ) from None
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RonnaError(
            f"byte 0x{data[error.start]:02x} is not utf-8",
            where=f"{path}:{line}",
            fix="save the file as utf-8",
        ) from None
    except tomllib.TOMLDecodeError as error:
        position = re.search(r" \(at line (\d+), column \d+\)| \(at end of document\)", str(error))
        line = int(position[1]) if position and position[1] else data.count(b"\n") + 1
        what = str(error).replace(position[0], "") if position else str(error)
        raise RonnaError(
            f"not TOML: {what}", where=f"{path}:{line}", fix='write key = value, with strings in "quotes"'
        ) from None


def apply_sets(tree: Tree, sets: Sequence[str]) -> Tree:
    """A copy of `tree` with each `key.path=value` put in; `data.sources.0.weight=2` reaches into a list.

    A value is TOML (`1e-4`, `true`, `[1, 2]`, `"quoted"`) or else a bare string; an empty value
    (`train.clip=`) takes the key away, so that its default holds. RonnaError on any other form.
    """
    tree = copy.deepcopy(tree)
    for text in sets:
        path, equals, value = text.partition("=")
        path = path.strip()
        if not equals or not _KEY.fullmatch(path):
            raise RonnaError("not of the form key.path=value", where=f"--set {text}", fix=_SET_EXAMPLE)
        *tables, name = path.split(".")
        table: Any = tree
        for depth, part in enumerate(tables):
            table = _step_into(table, part, text, ".".join(tables[:depth]))
        if isinstance(table, list) and name.isdecimal() and int(name) < len(table):
            table[int(name)] = _toml_value(value)
        elif not isinstance(table, dict):
            raise RonnaError(f"{'.'.join(tables)} is not a table", where=f"--set {text}", fix=_SET_EXAMPLE)
        elif value.strip():
            table[name] = _toml_value(value)
        elif name in table:
            del table[name]
        else:
            raise RonnaError(f"no {path} to take away", where=f"--set {text}", fix='an empty string is ""')
    return tree


def _step_into(table: Any, part: str, text: str, above: str) -> Any:
    if isinstance(table, dict):
        return table.setdefault(part, {})
    if isinstance(table, list) and part.isdecimal() and int(part) < len(table):
        return table[int(part)]
    what = f"{above} has {len(table)} entries" if isinstance(table, list) else f"{above} is not a table"
    raise RonnaError(what, where=f"--set {text}", fix=_SET_EXAMPLE)


def _toml_value(text: str) -> Any:
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    # A newline could smuggle in further keys, and a run called 2026-01-31 is a name, not a date.
    known = len(tree) == 1 and isinstance(tree["value"], bool | int | float | str | list | dict)
    return tree["value"] if known else text.strip()


def dump_toml(config: BaseModel) -> str:
    """TOML text of every field, fields that are None left out; `build` of it equals `config`."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def config_hash(config: BaseModel) -> str:
    """sha256 (hex) of the canonical JSON: sorted keys, no spaces. A new field that is None keeps the hash."""
    tree = config.model_dump(mode="json", exclude_none=True)
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def build(model: type[C], tree: Tree, where: str, ways: Mapping[str, str] | None = None) -> C:
    """`tree` as a `model`; `where` names the file in the RonnaError that lists every mistake at once. ways: how else
    than in a file a key is given, by key."""
    # Strict, or `steps = true` would quietly train one step; as JSON, or strict would refuse a list
    # for a tuple and a string for a path.
    text = json.dumps(_with_defaults(model, tree), default=str)
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        mistakes = _merge(m for e in error.errors(include_url=False) for m in _mistakes(model, dict(e), ways or {}))
    lines = [": ".join(filter(None, (m.key, m.what))) for m in mistakes]
    if len(mistakes) == 1:
        raise RonnaError(lines[0], where=where, fix=mistakes[0].fix or None)
    listed = "".join(f"\n    {line}" + f"; {m.fix}" * bool(m.fix) for line, m in zip(lines, mistakes, strict=True))
    fix = "mend each line above, in the file or with --set key.path=value"
    raise RonnaError(f"{len(mistakes)} mistakes{listed}", where=where, fix=fix)


def _with_defaults(model: type[BaseModel], tree: Tree) -> Tree:
    """`tree` where a table written in part keeps the rest of its default, unless it names another `kind`.

    So `optim.lr = 1e-4` alone changes the rate of the optimizer that a verb has by default, and nothing else.
    """
    tree = model.suggested(tree) if issubclass(model, Config) else tree
    merged = dict(tree)
    for name, field in model.model_fields.items():
        given, default = tree.get(name), field.default
        if not isinstance(given, Mapping) or not isinstance(default, Config):
            continue
        usual = default.model_dump(mode="json", exclude_none=True)
        if given.get("kind", usual.get("kind")) == usual.get("kind"):
            merged[name] = {**usual, **_with_defaults(type(default), dict(given))}
    return merged


class _Mistake(NamedTuple):
    key: str
    what: str
    fix: str


def _merge(mistakes: Iterator[_Mistake]) -> list[_Mistake]:
    """One line a key: a value that fits no member of a union fails once for each of them."""
    by_key: dict[tuple[str, str], list[str]] = {}
    for key, what, fix in mistakes:
        by_key.setdefault((key, what), []).append(fix)
    return [
        _Mistake(key, what, " or ".join([fixes[0], *(fix.removeprefix("it should be ") for fix in fixes[1:])]))
        for (key, what), fixes in by_key.items()
    ]


def _mistakes(model: type[BaseModel], error: dict[str, Any], ways: Mapping[str, str]) -> Iterator[_Mistake]:
    if error["type"] != "missing":
        yield _mistake(model, error)
        return
    for key, annotation in _lacking(*_locate(model, error["loc"])):
        yield _Mistake(key, "missing", ways.get(key) or f"add {key} = {_expected(annotation)}")


def _lacking(key: str, annotation: Any) -> Iterator[tuple[str, Any]]:
    """What is to be written for a key that is not there: of a table each key that has no default."""
    if tags := _tags(annotation):
        yield _dot(key, "kind"), Literal[tuple(tags)]
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            if field.is_required():
                yield from _lacking(_dot(key, name), field.annotation)
    else:
        yield key, annotation


def _mistake(model: type[BaseModel], error: dict[str, Any]) -> _Mistake:
    key, here = _locate(model, error["loc"])
    found = f"found {_show(error['input'])}"
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            *above, name = error["loc"]
            table, owner = _locate(model, above)
            union = _members(_locate(model, above[:-1])[1]) if above else []
            if kinds := [kind for m in union if str(name) in _fields(m) and (kind := _kind_of(m))]:
                return _Mistake(key, f"no key of this kind of {table}", f'set {_dot(table, "kind")} = "{kinds[0]}"')
            return _Mistake(key, "unknown key", _nearest_key(model, str(name), table, list(_fields(owner))))
        case "union_tag_invalid":
            tag, tags = error["ctx"]["tag"], _tags(here)
            return _Mistake(_dot(key, "kind"), f'unknown kind "{tag}"', _nearest(tag, tags))
        case "union_tag_not_found":
            return _Mistake(_dot(key, "kind"), "missing", _nearest("", _tags(here)))
        case "literal_error":
            allowed = [value for member in _members(here) for value in get_args(member)]
            return _Mistake(key, found, _nearest(error["input"], allowed))
        case "value_error":
            says = error["msg"].removeprefix("Value error, ")
            return _Mistake(key, says, "") if isinstance(error["input"], dict) else _Mistake(key, found, says)
    expected = error["msg"].removeprefix("Input should be ").split(", unable")[0]
    return _Mistake(key, found, f"it should be {_TOML_NAMES.get(error['type'], expected)}")


def _locate(model: Any, loc: Sequence[str | int]) -> tuple[str, Any]:
    """Pydantic's location as the dotted key a user wrote, and the annotation that stands there."""
    here, key = model, ""
    for part in loc:
        members = [member for member in _members(here) if member is not NoneType]
        if len(members) > 1:  # here pydantic names the union's member, which no file does
            here = next((m for m in members if part in (_kind_of(m), getattr(m, "__name__", None))), here)
            continue
        key = _dot(key, str(part))
        owner, args = members[0], get_args(members[0])
        if isinstance(part, int):
            here = args[part] if part < len(args) and ... not in args else next(iter(args), Any)
        else:
            here = _fields(owner).get(part, args[1] if get_origin(owner) is dict else Any)
    return key, here


def _members(annotation: Any) -> list[Any]:
    """The types a union holds, NoneType among them, each freed of Annotated; [annotation] for no union."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for arg in get_args(annotation) for member in _members(arg)]
    return [annotation]


def _fields(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}


def _kind_of(member: Any) -> str | None:
    return next(iter(get_args(_fields(member).get("kind"))), None)


def _tags(annotation: Any) -> list[str]:
    return [kind for member in _members(annotation) if (kind := _kind_of(member))]


def _keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key below a model; lists and dicts are not entered."""
    for member in _members(annotation):
        for name, inner in _fields(member).items():
            yield _dot(prefix, name)
            yield from _keys(inner, _dot(prefix, name))


def _nearest_key(model: type[BaseModel], name: str, table: str, siblings: list[str]) -> str:
    if near := get_close_matches(name, siblings, n=1):
        return f"did you mean {_dot(table, near[0])}?"
    elsewhere = [key for key in _keys(model) if key.rpartition(".")[2] == name]
    return f"did you mean {elsewhere[0]}?" if elsewhere else f"known keys here: {', '.join(siblings)}"


def _nearest(value: Any, allowed: Sequence[Any]) -> str:
    near = get_close_matches(str(value), [str(choice) for choice in allowed], n=1)
    choices = f"one of: {', '.join(_show(choice) for choice in allowed)}"
    return f'did you mean "{near[0]}"? {choices}' if near else f"it should be {choices}"


def _expected(annotation: Any) -> str:
    (first, *_) = _members(annotation)
    if get_origin(first) is Literal:
        return " or ".join(_show(choice) for choice in get_args(first))
    return _PLACES.get(get_origin(first) or first, f"<{getattr(first, '__name__', 'value')}>")


def _show(value: Any) -> str:
    text = "a table" if isinstance(value, dict) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _dot(above: str, name: str) -> str:
    return f"{above}.{name}" if above else name
