"""What a run file may say: one frozen model per verb."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from ronna.base.config import Config, Tree, one_or_more
from ronna.base.track import WandbConfig
from ronna.decoding.sampling import GenerateConfig
from ronna.model.fourbit import Quantize
from ronna.objectives.clm import CLMConfig
from ronna.objectives.denoise import DenoiseConfig
from ronna.objectives.mlm import MLMConfig
from ronna.parallel.world import ParallelConfig
from ronna.peft.methods import PeftConfig
from ronna.tasks.classify import ClassifyConfig
from ronna.tasks.table import TaskConfig
from ronna.text.clean import CleanConfig
from ronna.text.training import TokenizerConfig
from ronna.train.loop import TrainConfig
from ronna.train.optim import AdamW, OptimizerConfig
from ronna.train.schedule import Linear, Schedule

Several = Annotated[tuple[str, ...], BeforeValidator(one_or_more), Field(min_length=1)]


class ModelConfig(Config):
    name: str  # a model folder, a preset's name, or hub:ORG/NAME
    dropout: float | None = Field(None, ge=0, lt=1)  # None: as the folder or the family has it
    settings: dict[str, int | float] = Field({})  # keys of config.json that a preset is to have otherwise
    scratch: bool = False  # a folder's architecture with new weights, to compare with


class StartConfig(ModelConfig):
    """What fine-tuning starts from: a folder, or a preset with new weights."""

    tokenizer: str | None = None  # folder of one; None: the model folder's own
    quantize: Quantize | None = None  # hold the linear maps of the blocks in 4 bits, under an adapter


class TrackConfig(Config):
    tensorboard: bool = False
    wandb: WandbConfig | None = None
    trackio: bool = False


class ShardsConfig(Config):
    train: str  # folder written by `ronna prepare`
    validation: str | None = None  # another; None: the train folder's `validation` neighbour, if there is one
    validation_rows: int = Field(256, ge=1)  # packed rows to measure the validation loss on


class RecordsConfig(Config):
    """Files of labelled records; columns are guessed where they are not named."""

    train: str
    validation: str | None = None  # None: 10% of train, by a hash of the text
    test: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    limit: int | None = Field(None, ge=1)  # training rows
    max_bad_rows: int = Field(0, ge=0)
    allow_overlap: bool = False  # rows of train that also stand in validation or test


Setting = Literal["lr", "epochs", "batch", "rank"]
Ends = tuple[PositiveFloat, PositiveFloat]
Choices = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class SearchConfig(Config):
    """Trials of other settings, compared on the validation data. Ranges that nobody gives lie around the run's own."""

    trials: int = Field(ge=1)
    over: Annotated[tuple[Setting, ...], Field(min_length=1)] | None = None  # None: all of them that the run has
    lr: Ends | None = None  # None: a quarter of the run's to four times
    epochs: Ends | None = None  # whole numbers where both ends are; None: 1 to twice the run's
    batch: Choices | None = None  # None: half the run's, the same, twice
    rank: Choices | None = None  # of the adapter; None: half the run's, the same, twice, four times
    prune: bool = True  # stop a trial that is behind most others


class PretrainRun(Config):
    verb: Literal["pretrain"] = "pretrain"
    out: str
    seed: int = Field(0, ge=0)
    device: str = "auto"
    model: ModelConfig
    data: ShardsConfig
    objective: Annotated[MLMConfig | CLMConfig | DenoiseConfig, Field(discriminator="kind")]
    optim: OptimizerConfig = AdamW()
    schedule: Schedule = Linear(warmup=0.05)
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    track: TrackConfig = TrackConfig()


# Where the user names none: adapters want larger steps than whole models, and so do models without a past; preferences
# want smaller ones. Questions and conversations are longer than what is classified.
FULL, SCRATCH = 5e-5, 5e-4
RATES = {"lora": 5e-4, "adalora": 1e-3, "houlsby": 1e-3, "bitfit": 1e-3, "prompt": 5e-3, "prefix": 1e-2}
MADE = 1e-3  # for a prefix that a network makes
NORMS = 0.05  # of the rate: Houlsby's norms are trained already, and take the steps of a whole model
SHARES = {"dpo": 0.02}  # of the rate
LENGTHS = {"span_qa": 384, "seq2seq": 256, "dialogue": 512, "dpo": 512}


class FinetuneRun(Config):
    verb: Literal["finetune"] = "finetune"
    out: str
    seed: int = Field(0, ge=0)
    device: str = "auto"
    model: StartConfig
    data: RecordsConfig
    task: TaskConfig = ClassifyConfig()
    peft: PeftConfig | None = None  # None: every weight learns
    optim: OptimizerConfig = AdamW(lr=FULL, betas=(0.9, 0.999), weight_decay=0.01)  # lr: by method and task
    schedule: Schedule = Linear(warmup=0.06)
    train: TrainConfig = TrainConfig(epochs=3)
    search: SearchConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    track: TrackConfig = TrackConfig()

    @classmethod
    def suggested(cls, tree: Tree) -> Tree:
        task, peft, optim, train = (tree.get(name) or {} for name in ("task", "peft", "optim", "train"))
        if not all(isinstance(table, dict) for table in (task, peft, optim, train)):
            return tree  # which validation will refuse
        kind, model = str(task.get("kind")), tree.get("model")
        scratch = isinstance(model, dict) and model.get("tokenizer") is not None
        rate = RATES.get(str(peft.get("kind")), SCRATCH if scratch else FULL) * SHARES.get(kind, 1.0)
        rate = MADE if peft.get("kind") == "prefix" and peft.get("hidden") else rate
        length = LENGTHS.get(kind)
        if optim.get("kind", "adamw") == "adamw":
            parts = {"rates": {"norm": NORMS}} if peft.get("kind") == "houlsby" else {}
            tree = {**tree, "optim": {"lr": rate, **parts, **optim}}
        return {**tree, "train": {"length": length, **train}} if length else tree


class PrepareRun(Config):
    """Text files -> clean, deduplicated, tokenized shards: OUT/train and OUT/validation."""

    verb: Literal["prepare"] = "prepare"
    out: str
    input: Several  # files, globs, or a folder of splits
    tokenizer: str
    text: str = "text"  # column of the documents
    validation: float = Field(0.01, ge=0, lt=1)  # share of documents held out, where the input has no such split
    clean: CleanConfig = CleanConfig()
    shard_tokens: int = Field(2**26, ge=1024)
    engine: Literal["local", "ray"] = "local"  # ray: on the workers of a Ray cluster, with the same shards
    max_bad_rows: int = Field(0, ge=0)


class TokenizerRun(Config):
    verb: Literal["tokenizer train"] = "tokenizer train"
    out: str
    input: Several
    text: Several = ("text",)  # columns to read of a record
    max_bad_rows: int = Field(0, ge=0)
    tokenizer: TokenizerConfig = TokenizerConfig()


class InspectRun(Config):
    verb: Literal["data inspect"] = "data inspect"
    input: Several
    tokenizer: str | None = None  # to count tokens with
    text: str | None = None
    label: str | None = None
    max_bad_rows: int = Field(1_000_000, ge=0)  # looking at data must not stop at what it is to find


class Use(Config):
    """What every verb that uses a trained folder has."""

    model: str  # a model folder, or hub:ORG/NAME
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    quantize: Quantize | None = None  # hold the linear maps of the blocks in 4 bits


class UseOnRecords(Use):
    text: str | None = None
    text_pair: str | None = None
    length: int | None = Field(None, ge=8)  # tokens of a sequence or window; None: as in training, at most 512
    max_bad_rows: int = Field(0, ge=0)


class EvaluateRun(UseOnRecords):
    verb: Literal["evaluate"] = "evaluate"
    data: Several
    out: str | None = None  # folder for the report
    label: str | None = None


class PredictRun(UseOnRecords):
    verb: Literal["predict"] = "predict"
    input: str = "-"
    output: str = "-"
    batch: int = Field(256, ge=1)  # records read at a time
    relations: str | None = None  # a folder of the relation task, asked of the entities that a tag folder finds
    pairs: int = Field(200, ge=1)  # of entities of a record, at most: the nearest ones


class GenerateRun(Use):
    verb: Literal["generate"] = "generate"
    prompt: Several
    decoding: GenerateConfig = GenerateConfig()


class DoctorRun(Config):
    """The checks of a run file before it starts; `run` is the path of one."""

    verb: Literal["doctor"] = "doctor"
    run: str
