"""The config.json of a model folder, which says of a model what it is, or is not written."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.families import Family, family_of, label_maps

# What another program wrote about its own file and would be wrong about ours.
STALE = {
    "_name_or_path", "auto_map", "dtype", "torch_dtype", "transformers_version", "num_labels", "tag_transitions"
}  # fmt: skip
LABELS = {"id2label", "label2id", "problem_type"}


def save_config(
    cfg: c.Model,
    family: Family,
    folder: Path,
    *,
    labels: list[str] | None = None,
    problem_type: str | None = None,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json alone, as `save_folder` does."""
    write_config(folder, folder_config(family, cfg, labels, problem_type, extra_config))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def folder_config(
    family: Family,
    cfg: c.Model,
    labels: list[str] | None,
    problem_type: str | None,
    extra_config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    config = merged_config(family, cfg, labels, problem_type, extra_config or {})
    refuse_untrue(family, cfg, config)
    return config


def merged_config(
    family: Family, cfg: c.Model, labels: list[str] | None, problem_type: str | None, extra: Mapping[str, Any]
) -> dict[str, Any]:
    config = family.to_hf(cfg)
    dropped = config.keys() | STALE | LABELS
    config |= {k: v for k, v in extra.items() if k not in dropped or k.endswith("_token_id")}
    if labels is None and cfg.classifier and len(extra.get("id2label") or {}) == cfg.classifier.labels:
        config |= {k: extra[k] for k in LABELS & extra.keys()}
    if labels is not None:
        if cfg.classifier is None or len(labels) != cfg.classifier.labels:
            scores = cfg.classifier.labels if cfg.classifier else 0
            raise RonnaError(f"{len(labels)} names for {scores} scores", fix="give one name for each label")
        config |= label_maps(labels)
    if problem_type is not None:
        config["problem_type"] = problem_type
    return config


def refuse_untrue(family: Family, cfg: c.Model, config: dict[str, Any]) -> None:
    """RonnaError unless the config.json, read again, describes the same computation."""
    back = family_of(config).from_hf(config)
    back = replace(back, head=back.head if cfg.head else None)
    if found := difference(computation(cfg), computation(back), "model"):
        raise RonnaError(
            f"{family.name} folders cannot express this model: {found}",
            fix="change that part, or save it with the family that it belongs to",
        )


def computation(cfg: c.Model) -> c.Model:
    """The model without what makes no difference to its outputs."""
    return replace(c.without_dropout(cfg), init=c.Init(), context=None, pool=None)


def difference(a: Any, b: Any, path: str) -> str | None:
    """The first place where two trees of parts differ, in words."""
    if a == b:
        return None
    if is_dataclass(a) and type(a) is type(b):
        pairs = [(getattr(a, f.name), getattr(b, f.name), f"{path}.{f.name}") for f in fields(a)]
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        pairs = [(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return f"{path} is {a!r}, there it is {b!r}"
    return next(found for x, y, where in pairs if (found := difference(x, y, where)))
