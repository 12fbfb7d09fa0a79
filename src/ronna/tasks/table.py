"""Every task by the name that run files call it, and by what its folders hold."""

from typing import Annotated

from pydantic import Field

from ronna.model.config import Classifier, Unit
from ronna.tasks.base import Task
from ronna.tasks.classify import Classify, ClassifyConfig
from ronna.tasks.dialogue import Dialogue, DialogueConfig
from ronna.tasks.embed import Embed, EmbedConfig
from ronna.tasks.preference import Preference, PreferenceConfig
from ronna.tasks.relation import Relation, RelationConfig
from ronna.tasks.seq2seq import Seq2Seq, Seq2SeqConfig
from ronna.tasks.span_qa import SpanQA, SpanQAConfig
from ronna.tasks.tag import Tag, TagConfig

TaskConfig = Annotated[
    ClassifyConfig
    | TagConfig
    | RelationConfig
    | SpanQAConfig
    | EmbedConfig
    | Seq2SeqConfig
    | DialogueConfig
    | PreferenceConfig,
    Field(discriminator="kind"),
]
TASKS: dict[str, type[Task]] = {
    "classify": Classify,
    "tag": Tag,
    "relation": Relation,
    "span_qa": SpanQA,
    "embed": Embed,
    "seq2seq": Seq2Seq,
    "dialogue": Dialogue,
    "dpo": Preference,
}
OF: dict[Unit, type[Task]] = {"sequence": Classify, "tokens": Tag, "spans": SpanQA, "pair": Relation}


def task_of(classifier: Classifier) -> type[Task]:
    """The task that a folder with this classifier was made for."""
    return OF[classifier.of]
