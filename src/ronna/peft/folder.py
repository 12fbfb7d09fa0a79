"""Adapters on disk: adapter_config.json and adapter_model.safetensors.

A LoRA, a prompt and a prefix are written as the `peft` library has them, under the names of transformers, so that
`PeftModel.from_pretrained` gives the same logits. Other methods have no layout that everybody reads: theirs is
`"peft_type": "RONNA"`, the method's settings under "method", and tensors under our own parameter names.

config.json beside them is the adapted model's, with label names; "base_fingerprint" in it tells another base apart.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.model.families import Family
from ronna.model.heads import Classifier
from ronna.model.transformer import Transformer
from ronna.peft.adalora import AdaLoraConfig
from ronna.peft.files import AGAIN, CONFIG, FITS, WEIGHTS, AdapterFolder, put
from ronna.peft.lora import LoraConfig
from ronna.peft.lora_folder import as_lora, attach_lora
from ronna.peft.methods import NAME, PeftConfig, adapt, trained
from ronna.peft.own import add_own, bare_classifier, new_classifier
from ronna.peft.prefix import PrefixConfig
from ronna.peft.prompt import PromptConfig
from ronna.peft.virtual_folder import as_virtual, attach_virtual, two_stacks

TASKS = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "spans": "QUESTION_ANS", "pair": "FEATURE_EXTRACTION"}


# Out


def write_adapter(
    model: Transformer,
    family: Family,
    folder: Path,
    config: PeftConfig,
    base: str,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter that `adapt` attached, and what was trained beside it.

    tensors: the trained state to write instead of the model's own, by full name. Raises OSError or SafetensorError
    where the disk refuses.
    """
    state = dict(tensors) if tensors is not None else {n: p for n, p in model.named_parameters() if p.requires_grad}
    state = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in state.items()}
    common = {"base_model_name_or_path": base, "task_type": task_type(model), "inference_mode": True}
    if isinstance(config, LoraConfig | AdaLoraConfig):
        settings, stored = as_lora(model, family, config, state)
    elif isinstance(config, PromptConfig) or (isinstance(config, PrefixConfig) and not two_stacks(model)):
        settings, stored = as_virtual(model, family, config, state)
    else:
        settings, stored = {"peft_type": "RONNA", "method": config.model_dump(mode="json")}, state
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(common | settings, indent=2) + "\n", encoding="utf-8")


def task_type(model: Transformer) -> str:
    if model.classifier is not None:
        return TASKS[model.classifier.cfg.of]
    if model.cfg.decoder is None:
        return "FEATURE_EXTRACTION"
    return "CAUSAL_LM" if model.cfg.encoder is None else "SEQ_2_SEQ_LM"


# In


def attach_adapter(model: Transformer, family: Family, adapter: AdapterFolder, name: str = NAME) -> None:
    """Put a read adapter on its base, at work at once, beside those that are there.

    It gets a classifier of its own where it has one. Raises RonnaError for tensors that do not fit the base.
    """
    base = bare_classifier(model)
    described = adapter.described
    cfg = described.classifier if described is not None else None if base is None else base.cfg
    classifier, missing = new_classifier(model, cfg)
    match adapter.settings["peft_type"]:
        case "LORA":
            add_own(model, name, classifier)
            used = attach_lora(model, family, adapter, name, missing)
        case "PROMPT_TUNING" | "PREFIX_TUNING" as kind:
            add_own(model, name, classifier)
            used = attach_virtual(model, family, adapter, name, missing, prefix=kind == "PREFIX_TUNING")
        case _:
            used = attach_own(model, adapter, name, classifier)
    if unknown := sorted(adapter.tensors.keys() - used):
        raise RonnaError(f"no place in the model for {', '.join(unknown[:4])}", where=str(adapter.folder), fix=FITS)


def attach_own(model: Transformer, adapter: AdapterFolder, name: str, classifier: Classifier | None) -> set[str]:
    try:
        config: PeftConfig = TypeAdapter(PeftConfig).validate_python(adapter.settings.get("method"))
    except ValidationError as error:
        raise RonnaError(
            f"settings of no method: {error.errors()[0]['msg']}", where=f"{adapter.folder}/{CONFIG}", fix=AGAIN
        ) from None
    adapt(model, config, name=name, classifier=classifier)
    used = set()
    for ours, parameter in trained(model).items():
        key = ours.replace(f".changes.{name}.", f".changes.{NAME}.")
        if key not in adapter.tensors:
            raise RonnaError(f"{ours} is missing", where=f"{adapter.folder}/{WEIGHTS}", fix=AGAIN)
        put(parameter, adapter.tensors[key], ours, adapter)
        used.add(key)
    return used
