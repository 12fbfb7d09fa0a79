"""Labels as people write them."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow

DIRECTION = re.compile(r"\((e1,e2|e2,e1)\)$")
INTEGER = re.compile(r"-?[0-9]{1,18}")
LARGEST = 3.4e38  # of single precision
NO_RELATION = {"other", "no_relation", "norelation", "na", "none", "unknown", "无", "无关系", "未知"}


def usable_label(label: Any, column: str) -> Any:
    if isinstance(label, list):
        if any(isinstance(x, list) for x in label):
            raise BadRow("label is not a number or a name", f"{column} has a list within a list")
        return [usable_label(x, column) for x in label]
    if label is None or label == "":
        raise BadRow("no label", f"{column} is empty")
    if isinstance(label, float) and not math.isfinite(label):
        raise BadRow("label is not a number or a name", f"{column} = {label}")
    if isinstance(label, dict):
        raise BadRow("label is not a number or a name", f"{column} is an object")
    return label


def number(value: Any) -> float | None:
    """A number that single precision can hold, also written as text; None for anything else."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if abs(found) <= LARGEST and not isinstance(value, bool) else None


def label_name(label: Any) -> str:
    """1, 1.0 and "1" are the same label: a CSV with a blank somewhere must not rename its classes."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)


def names_of(label: Any) -> list[str]:
    """A label alone is as good as a list of one."""
    return [label_name(x) for x in (label if isinstance(label, list) else [label])]


def check_known(labels: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises RonnaError for a label that the training data does not have."""
    names = set(known)
    for label in labels:
        if label not in names:
            raise RonnaError(
                f"label {label!r} is not among the {len(known)} labels of the training data "
                f"({', '.join(known[:12])}{', ...' if len(known) > 12 else ''})",
                where=where,
                fix="correct it, or add training rows that have it",
            )


class NamedRelation(NamedTuple):
    """What a label says of two entities e1 and e2."""

    kind: str | None  # None: no relation
    order: str | None  # "e1,e2" or "e2,e1", which is head and which is tail; None: the label does not say


def named_relation(label: str) -> NamedRelation:
    """R and its direction, of R(e1,e2), R(e2,e1) or R."""
    found = DIRECTION.search(label)
    kind = label[: found.start()] if found else label
    none = kind.lower().replace("-", "_") in NO_RELATION
    return NamedRelation(None if none else kind, found[1] if found else None)
