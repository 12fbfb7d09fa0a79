"""Every task by the name that run files call it, and by what its folders hold."""

from typing import Annotated

from pydantic import Field

from ronna.model.config import Classifier
from ronna.tasks.base import Task
from ronna.tasks.classify import Classify, ClassifyConfig
from ronna.tasks.tag import Tag, TagConfig

TaskConfig = Annotated[ClassifyConfig | TagConfig, Field(discriminator="kind")]
TASKS: dict[str, type[Task]] = {"classify": Classify, "tag": Tag}


def task_of(classifier: Classifier) -> type[Task]:
    """The task that a folder with this classifier was made for."""
    return Tag if classifier.of == "tokens" else Classify
