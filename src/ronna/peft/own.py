"""Weights of the base that an adapter has its own of, such as a classifier, norms and biases: switched with it."""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.heads import Classifier
from ronna.model.transformer import Transformer


@dataclass(frozen=True)
class Own:
    """classifier: None where that of the base serves. others: by their full names in the model."""

    classifier: Classifier | None
    others: dict[str, nn.Parameter]

    def parameters(self) -> Iterator[nn.Parameter]:
        if self.classifier is not None:
            yield from self.classifier.parameters()
        yield from self.others.values()


class AdaptedTransformer(Transformer):
    """A Transformer with adapters; only `add_own` makes one, out of a Transformer that is there.

    What is not at work is kept outside of the tree of modules, so that no state and no optimizer sees it.
    """

    bare: Own  # the base's
    own: dict[str, Own]  # every adapter's, by name
    at_work: tuple[str, ...]

    def show(self, *names: str) -> None:
        """Let the weights of these adapters stand in the model; of several that have one, the last."""
        classifier, others = self.bare.classifier, dict(self.bare.others)
        for name in names:
            classifier = self.own[name].classifier or classifier
            others |= self.own[name].others
        self.classifier = None if classifier is None else classifier.train(self.training)
        self.cfg = replace(self.cfg, classifier=None if classifier is None else classifier.cfg)
        for path, parameter in others.items():
            owner, _, leaf = path.rpartition(".")
            setattr(self.get_submodule(owner), leaf, parameter)
        self.tie()
        self.at_work = names

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for own in (self.bare, *self.own.values()):
            if own.classifier is not None:
                own.classifier._apply(fn)
            for parameter in own.others.values():
                parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)


def adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that a model carries, at work or not."""
    return list(model.own) if isinstance(model, AdaptedTransformer) else []


def at_work(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that work on a model, the one nearest to the base first."""
    return model.at_work if isinstance(model, AdaptedTransformer) else ()


def refuse_taken(model: nn.Module, name: str) -> None:
    if name in adapters(model):
        raise RonnaError(f"there is an adapter {name!r} already", fix="give this one another name")


def add_own(model: Transformer, name: str, classifier: Classifier | None) -> None:
    """Begin an adapter, at work at once, with a classifier of its own. Raises RonnaError where the name is taken."""
    refuse_taken(model, name)
    if not isinstance(model, AdaptedTransformer):
        model.__class__ = AdaptedTransformer
        assert isinstance(model, AdaptedTransformer)
        model.bare, model.own, model.at_work = Own(model.classifier, {}), {}, ()
    model.own[name] = Own(classifier, {})
    model.show(*model.at_work, name)


def copy_own(model: Transformer, name: str, paths: Iterable[str]) -> None:
    """Give an adapter copies of the base's weights of these names, in their place."""
    assert isinstance(model, AdaptedTransformer)
    live = dict(model.named_parameters())
    for path in paths:
        base = model.bare.others.setdefault(path, live[path])
        model.own[name].others[path] = nn.Parameter(base.detach().clone())
    model.show(*model.at_work)


def own_parameters(model: Transformer, name: str) -> Iterator[nn.Parameter]:
    assert isinstance(model, AdaptedTransformer)
    return model.own[name].parameters()


def bare_classifier(model: Transformer) -> Classifier | None:
    return model.bare.classifier if isinstance(model, AdaptedTransformer) else model.classifier


def new_classifier(model: Transformer, cfg: c.Classifier | None) -> tuple[Classifier | None, set[str]]:
    """A classifier with the base's weights where those have its names and shapes, and the names of the others."""
    base = bare_classifier(model)
    if cfg is None:
        return None, set()
    if base is not None and base.cfg == cfg:
        return deepcopy(base), set()
    with torch.device("meta"):
        made = Classifier(cfg, model.cfg.dim)
    made.to_empty(device=model.device)
    known = {} if base is None else dict(base.named_parameters())
    missing = set()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in known and known[name].shape == parameter.shape:
                parameter.copy_(known[name])
            else:
                missing.add(name)
    return made, missing


def every_parameter(model: Transformer) -> Iterator[nn.Parameter]:
    """The model's and those of adapters that are not at work."""
    yield from model.parameters()
    if isinstance(model, AdaptedTransformer):
        for own in (model.bare, *model.own.values()):
            yield from own.parameters()
