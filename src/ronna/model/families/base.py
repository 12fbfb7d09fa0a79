"""What a family is: settings of its config.json, names of its weights, its usual sizes. No torch here."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ronna.base.config import build
from ronna.base.errors import RonnaError
from ronna.model.config import Activation, Classifier, LinearScaling, Llama3Scaling, Model, Rotary, Stack, Unit

Count = Annotated[int, Field(gt=0, lt=2**28)]  # a damaged number should not ask for more than any machine has
Depth = Annotated[int, Field(gt=0, le=4096)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]

HubActivation = Literal[
    "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "silu", "swish", "relu", "tanh"
]  # fmt: skip
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "tanh": "tanh",
}


def hub_activation(act: Activation) -> str:
    return "gelu_new" if act == "gelu_tanh" else act


# How transformers' class of a folder ends where it holds a classifier of ours.
CLASSIFIERS: dict[Unit, str] = {
    "sequence": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "spans": "ForQuestionAnswering",
    "pair": "ForRelationClassification",  # which transformers does not have: it reads such a folder as a bare model
}


class Settings(BaseModel):
    """The keys of a config.json that change what is computed.

    A key that is absent or null has the default of transformers' config class; others change nothing. A key
    whose type is a Literal of a single value guards a computation that no part of ours describes.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    architectures: tuple[str, ...] = ()
    id2label: dict[str, Any] | None = None
    num_labels: Count | None = None
    tag_transitions: bool = False  # ours: whether a classifier of tokens has them

    @property
    def unit(self) -> Unit | None:
        """What the folder's classifier scores; None where it has none."""
        for unit, ending in CLASSIFIERS.items():
            if any(name.endswith(ending) for name in self.architectures):
                return unit
        return None

    @property
    def labels(self) -> int:
        """How many scores a classifier gives."""
        return len(self.id2label) if self.id2label else self.num_labels or 2

    def with_transitions(self, classifier: Classifier) -> Classifier:
        """The family's classifier with the transitions that the folder says it has."""
        return replace(classifier, transitions=self.tag_transitions and self.unit == "tokens")


S = TypeVar("S", bound=Settings)


def read(kind: type[S], config: Mapping[str, Any]) -> S:
    """The settings in a parsed config.json; RonnaError names every key that is wrong or not supported."""
    return build(kind, {k: v for k, v in config.items() if v is not None}, where="config.json")


class Rope(BaseModel):
    """`rope_scaling` (transformers 4, without theta) or `rope_parameters` (5)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rope_type: Literal["default", "linear", "llama3"] = "default"
    rope_theta: Positive | None = None
    partial_rotary_factor: float = Field(1.0, ge=1, le=1)
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree  # which validation will refuse
        return {"rope_type": tree.get("type", "default")} | {k: v for k, v in tree.items() if v is not None}

    @model_validator(mode="after")
    def _complete(self) -> "Rope":
        llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        wanted = {"default": (), "linear": ("factor",), "llama3": llama3}[self.rope_type]
        if absent := [key for key in wanted if getattr(self, key) is None]:
            raise ValueError(f"{self.rope_type} rope needs {', '.join(absent)}")
        return self

    def rotary(self, theta: float) -> Rotary:
        """`theta` is what holds where these parameters do not say it."""
        scaling: LinearScaling | Llama3Scaling | None = None
        if self.rope_type == "linear" and self.factor:
            scaling = LinearScaling(self.factor)
        elif self.rope_type == "llama3" and self.factor and self.low_freq_factor and self.high_freq_factor:
            original = self.original_max_position_embeddings or 0
            scaling = Llama3Scaling(self.factor, self.low_freq_factor, self.high_freq_factor, original)
        return Rotary(self.rope_theta or theta, scaling)


def rope_scaling(rotary: Rotary) -> dict[str, Any] | None:
    """`rope_scaling` as transformers 4 writes it; `rope_parameters` is the same with theta."""
    match rotary.scaling:
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None


def rope_parameters(rotary: Rotary) -> dict[str, Any]:
    return {"rope_theta": rotary.theta, **(rope_scaling(rotary) or {"rope_type": "default"})}


@dataclass(frozen=True)
class Weight:
    """Where one of our tensors lies in a Hugging Face file.

    name: the key there; its .weight or .bias is added for a module. part, parts: the slice of a fused
    matrix's outputs. transpose: matrices are stored (in, out). row: vectors are stored (1, n).
    """

    name: str
    part: int = 0
    parts: int = 1
    transpose: bool = False
    row: bool = False


# Parts of ours that no published family has; transformers passes them over.
OWN = {"classifier.transitions": Weight("crf.transitions")}


def locate(names: Mapping[str, Weight], parameter: str) -> Weight:
    """The place of a parameter, given `Family.names`: its own entry, or that of its module."""
    if found := OWN.get(parameter) or names.get(parameter):
        return found
    module, _, leaf = parameter.rpartition(".")
    if module not in names:
        raise RonnaError(f"this family has no place for {parameter}", fix="leave that part out of the model")
    return replace(names[module], name=f"{names[module].name}.{leaf}")


def layered(ours: str, theirs: str, layers: int, table: Mapping[str, str | Weight]) -> dict[str, Weight]:
    """The entries of `table` for every layer: `ours` and `theirs` are what comes before, {} the layer."""
    weights = {key: Weight(value) if isinstance(value, str) else value for key, value in table.items()}
    return {
        ours.format(i) + key: replace(weight, name=theirs.format(i) + weight.name)
        for i in range(layers)
        for key, weight in weights.items()
    }


@dataclass(frozen=True)
class Family:
    """A kind of published model: functions between its Hugging Face folders and `config.Model`.

    settings: the keys that count, by config.json's model_type.
    from_hf: a parsed config.json (transformers 4 or 5) -> Model, always with its vocabulary head, with a
        classifier where `architectures` says so; RonnaError for what cannot be represented.
    to_hf: the way back, with `model_type` and `architectures` by the heads that the model has.
    names: our modules (or parameters) -> their place in the files.
    duplicates: keys that repeat another one where weights are tied.
    unties: whether a differing duplicate of the output matrix means two matrices instead of a broken file.
    classifier: the usual classifier for a number of labels of sequences or tokens; None for encoder-decoders.
    prefix: what the keys of a folder without heads leave out. heads, ignored: regexes of keys that belong
    to some head, and of keys that carry nothing. presets: config.json by name.
    aliases: common names of keys that the family calls otherwise.
    spans_prefix: what transformers' class for question answering has in place of `prefix`, where it differs.
    """

    name: str
    settings: dict[str, type[Settings]]
    from_hf: Callable[[Mapping[str, Any]], Model]
    to_hf: Callable[[Model], dict[str, Any]]
    names: Callable[[Model], dict[str, Weight]]
    duplicates: Callable[[Model], dict[str, str]]
    classifier: Callable[[Model, int, Unit], Classifier] | None
    prefix: str
    heads: str
    ignored: str
    presets: dict[str, dict[str, Any]]
    unties: Callable[[Model], bool] = lambda model: False
    spans_prefix: str | None = None
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def stored_name(self, model: Model, name: str) -> str:
        """A key of `names` as the files of this model have it."""
        if self.spans_prefix and model.classifier and model.classifier.of == "spans" and name.startswith(self.prefix):
            return self.spans_prefix + name.removeprefix(self.prefix)
        return name

    def in_head(self, key: str) -> bool:
        """Whether a key of a file belongs to some head."""
        return bool(re.match(self.heads, key)) or any(key == weight.name for weight in OWN.values())

    @property
    def model_types(self) -> tuple[str, ...]:
        return tuple(self.settings)


def head_size(dim: int, heads: int) -> int:
    if dim % heads:
        raise RonnaError(f"{dim} channels do not split into {heads} heads", where="config.json")
    return dim // heads


def only(stack: Stack | None) -> Stack:
    """A stack that models of the family always have."""
    assert stack is not None, "the model is not of this family"
    return stack


def one_head(model: Model, family: str) -> None:
    if model.head and model.classifier:
        raise RonnaError(
            f"a {family} folder holds a vocabulary head or a classifier, not both",
            fix="save the model without one of them",
        )


def decoder_classifier(model: Model, labels: int, of: Unit) -> Classifier:
    """GPT-2's and Llama's: of a sequence its last state, of tokens each one's behind dropout."""
    if of == "sequence":
        return Classifier(labels, "last", bias=False)
    return Classifier(labels, dropout=0.0 if of == "spans" else model.embedding.dropout, of=of)


def with_decoder_classifier(model: Model, h: Settings, dropout: float) -> Model:
    """The model with the classifier that the folder's architecture has, if any; dropout is for tokens and pairs."""
    if h.unit is None:
        return model
    classifier = h.with_transitions(decoder_classifier(model, h.labels, h.unit))
    return replace(model, classifier=replace(classifier, dropout=dropout if h.unit in ("tokens", "pair") else 0.0))


def architecture(model: Model, stem: str, lm: str) -> list[str]:
    """The class that transformers reads the folder with."""
    if model.classifier:
        return [stem + CLASSIFIERS[model.classifier.of]]
    return [stem + (lm if model.head else "Model")]


def classifier_keys(model: Model) -> dict[str, Any]:
    """id2label and label2id as transformers makes them up, `save_folder` puts real names; and what is ours."""
    if model.classifier is None:
        return {}
    own = {"tag_transitions": True} if model.classifier.transitions else {}
    return label_maps([f"LABEL_{i}" for i in range(model.classifier.labels)]) | own


def label_names(config: Mapping[str, Any]) -> list[str]:
    """The names of a classifier's scores in a config.json, in their order; transformers leaves out the usual two."""
    if not config.get("id2label"):
        return [f"LABEL_{i}" for i in range(config.get("num_labels") or 2)]
    return [str(name) for _, name in sorted(config["id2label"].items(), key=lambda pair: int(pair[0]))]


def label_maps(labels: list[str]) -> dict[str, Any]:
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
