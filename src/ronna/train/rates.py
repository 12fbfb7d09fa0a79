"""Rates that differ from part to part of a model."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import Field, PositiveFloat

from ronna.base.config import Config
from ronna.base.errors import RonnaError

T = TypeVar("T")


class Rated(Config):
    """An optimizer whose rate differs from part to part.

    rates: factors on it, by texts. Of those that a parameter's name holds the first one counts: {"norm": 0.05} lets
    norms take a twentieth of each step, {"default.b": 16.0} is LoRA+ (Hayou et al. 2024).
    """

    rates: dict[str, PositiveFloat] = Field(default_factory=dict)

    def factor(self, name: str) -> float:
        return next((factor for text, factor in self.rates.items() if text in name), 1.0)

    def refuse_unknown(self, names: Sequence[str]) -> None:
        """RonnaError for a text that none of the names holds. names: of what learns, on whichever rank."""
        for text in self.rates:
            if not any(text in name for name in names):
                fix = f"write a part of a name, such as {names[-1]}"
                raise RonnaError("no parameter that learns is called so", where=f"optim.rates.{text}", fix=fix)


def by_factor(config: Rated, named: Mapping[T, str]) -> list[tuple[float, dict[T, str]]]:
    """Parameters of each factor together."""
    found: defaultdict[float, dict[T, str]] = defaultdict(dict)
    for parameter, name in named.items():
        found[config.factor(name)][parameter] = name
    return list(found.items())
