"""What of a model a run writes and reads: the whole of it as a Hugging Face folder, or an adapter as a PEFT folder."""

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ronna.assemble import Parts
from ronna.base.errors import RonnaError
from ronna.base.hub import PREFIX as HUB
from ronna.base.hub import local_folder
from ronna.model.families import read_config, read_config_json
from ronna.model.folder import Loaded, is_language_model, load_folder, load_weights, save_folder, save_state
from ronna.model.folder_config import save_config
from ronna.model.fourbit import Quantize
from ronna.model.init import hold
from ronna.model.tensorfiles import fingerprint
from ronna.model.transformer import Transformer
from ronna.parallel.pipeline import whole_state
from ronna.parallel.sharded import gathered, rest
from ronna.parallel.world import ALONE, World
from ronna.peft.changes import activate
from ronna.peft.files import AdapterFolder, is_adapter, read_adapter
from ronna.peft.folder import attach_adapter, write_adapter
from ronna.peft.methods import trained
from ronna.peft.own import every_parameter
from ronna.text.tokenizer import Tokenizer
from ronna.train.checkpoint import MODEL, Checkpoint
from ronna.train.pieces import StoredTensors, find_pieces

WEIGHTS = "weights"  # files of parts in a checkpoint that is not yet one


class Store:
    """Writes and reads what a run trains. A frozen base is not written again: its folder is named."""

    def __init__(self, parts: Parts, world: World = ALONE):
        self.parts, self.world = parts, world

    def apart(self) -> dict[str, dict[str, Tensor]]:
        """Beside the folder that others read: what `restore` needs in its own names, or what `finish` makes it of."""
        if self.in_parts:
            return {WEIGHTS: dict(self.parts.model.named_parameters())}
        return {} if self.parts.peft is None else {"trained": dict(trained(self.parts.model))}

    def write(self, folder: Path) -> None:
        """A folder that transformers (or peft) loads, the tokenizer in it: by rank 0, which the others help. Raises
        OSError where the disk refuses."""
        model = self.parts.model
        state = whole_state(model) if self.parts.peft is None else dict(trained(model))
        with gathered(state, self.world) as whole:
            if whole is not None:
                self.write_state(folder, whole)

    def write_state(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        parts = self.parts
        if parts.peft is None:
            save_folder(parts.model, parts.family, folder, tensors=state, **self.described)
        else:
            write_adapter(parts.model, parts.family, folder, parts.peft, parts.base, tensors=state)
            save_config(parts.model.cfg, parts.family, folder, **self.described)
        self.write_beside(folder)

    @property
    def described(self) -> dict[str, Any]:
        """For config.json."""
        parts, keys = self.parts, token_ids(self.parts.tokenizer) | self.parts.folder_keys
        return {"labels": parts.labels, "problem_type": parts.problem_type, "extra_config": keys}

    def write_beside(self, folder: Path) -> None:
        """The tokenizer, and what else belongs into the folder."""
        parts = self.parts
        parts.tokenizer.save(folder)
        for name, text in parts.folder_files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")

    # In a checkpoint of several ranks: each writes its parts, and the folder is made of these behind the training.

    @property
    def in_parts(self) -> bool:
        return self.world.size > 1 and self.parts.peft is None

    def write_now(self, folder: Path) -> None:
        """`write`, unless it can wait for `finish`."""
        if not self.in_parts:
            self.write(folder)

    def finish(self) -> Callable[[Path], None]:
        """What makes the folder, of the parts in the checkpoint that it is given and of nothing that a step changes. It
        raises RonnaError where some cannot be seen from here."""
        if not (self.in_parts and self.world.main):
            return lambda checkpoint: None
        cfg, family, ranks = self.parts.model.cfg, self.parts.family, self.world.size
        types = {name: tensor.dtype for name, tensor in whole_state(self.parts.model).items()}

        def put_together(checkpoint: Path) -> None:
            files, folder = find_pieces(checkpoint, WEIGHTS), checkpoint / MODEL
            if len(files) < ranks:
                what = f"parts of the model of {len(files)} ranks are there, {ranks} have written some"
                raise RonnaError(what, where=str(checkpoint), fix="train in a folder that all machines share")
            save_state(cfg, family, folder, StoredTensors(files), types, **self.described)
            self.write_beside(folder)
            for file in files:
                file.unlink()

        return put_together

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """The weights of a checkpoint, to the bit."""
        model = self.parts.model
        if self.parts.peft is None:
            load_weights(model, self.parts.family, checkpoint.model_dir)
            return
        stored = checkpoint.tensors("trained")
        for name, parameter in trained(model).items():
            parameter.copy_(stored[name])

    def reopened(self, folder: Path, quantize: Quantize | None, device: torch.device) -> Transformer:
        """The model that `write` has put there, as `evaluate` will read it, but no matrix wider than it was trained,
        for which there may be no memory. One in shards gets its weights from there, any other is opened anew."""
        model, adapted = self.parts.model, self.parts.peft is not None
        self.world.any(False)  # it is there when rank 0 has come here
        if self.world.size > 1 and not adapted:
            rest(model)
            load_weights(model, self.parts.family, folder)
            return model
        computed, trained_in = model.compute, model.embedding.tokens.weight.dtype
        precision = partial(hold, matrices=min(computed, trained_in, key=lambda dtype: dtype.itemsize))
        if self.world.size == 1:
            let_go(model)
        opened = open_folder(folder, quantize, computed, precision).model.to(device, computed if adapted else None)
        opened.compute = computed
        return opened


def let_go(model: Transformer) -> None:
    """Give up the memory of a model's weights, whoever still holds the model, and what else nobody holds any more: an
    optimizer and the parameters that it steps hold each other."""
    for tensor in (*every_parameter(model), *model.buffers()):
        tensor.data, tensor.grad = torch.empty(0), None
    gc.collect()


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that transformers reads from config.json to pad, begin and end."""
    roles = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    return {f"{role}_token_id": i for role, i in roles.items() if i is not None}


def open_folder(
    name: str | Path,
    quantize: Quantize | None = None,
    dtype: torch.dtype = torch.float32,
    precision: Callable[[Transformer], object] | None = None,
) -> Loaded:
    """The model in a folder, with the heads that it has; an adapter's on its base. Raises RonnaError.

    quantize: hold the linear maps of its blocks in 4 bits. dtype: of what is read; what an adapter brings is fp32.
    precision: gives parameters of a model without adapter, which have no memory yet, another one than `dtype`.
    """
    folder = local_folder(str(name))
    adapted = is_adapter(folder)
    if adapted:
        loaded = open_adapted(folder, name, quantize, dtype)
    else:
        loaded = load_folder(folder, quantize=quantize, dtype=dtype, precision=precision)
    if "embedding_pooling" not in loaded.config and (pool := embedding_pool(folder)):
        loaded.config["embedding_pooling"] = pool
    return loaded


def embedding_pool(folder: Path) -> str | None:
    """How a folder of `sentence-transformers` pools, where it is one that we can."""
    try:
        said = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    modes = {name for name, value in said.items() if name.startswith("pooling_mode") and value is True}
    known = {"mean_tokens": "mean", "cls_token": "first", "lasttoken": "last"}
    return next((pool for name, pool in known.items() if modes == {f"pooling_mode_{name}"}), None)


def open_adapted(folder: Path, name: str | Path, quantize: Quantize | None, dtype: torch.dtype) -> Loaded:
    """A base with the adapter in `folder` on it."""
    adapter = read_adapter(folder)
    base = Path(adapter.base)
    if not base.is_dir() and str(name).startswith(HUB):  # the adapter is from there, so its base is too
        base = local_folder(HUB + adapter.base)
    if not base.is_dir():
        raise RonnaError(f"its base {adapter.base} is not there", where=str(folder), fix=MOVED)
    loaded = on_base(adapter, base, quantize, dtype)
    attach_adapter(loaded.model, loaded.family, adapter)
    return loaded


def open_beside(loaded: Loaded, name: str | Path, adapter: str) -> Loaded:
    """Another adapter of an opened base, put on the same model under the name `adapter`, with its own config.json.

    It works alone at once; `ronna.peft.changes.activate` lets the others work again.
    """
    folder = local_folder(str(name))
    found = read_adapter(folder)
    config = loaded.config if found.described is None else read_config_json(folder)
    one, other = (some.get("base_fingerprint") for some in (loaded.config, config))
    if one is not None and other is not None and one != other:
        raise RonnaError("it was trained on a base with other weights", where=str(folder), fix=APART)
    if found.described is not None and (found.described.classifier is None) != (loaded.model.classifier is None):
        raise RonnaError("of these adapters one has a classifier, the other none", where=str(folder), fix=APART)
    attach_adapter(loaded.model, loaded.family, found, adapter)
    activate(loaded.model, adapter)
    return replace(loaded, config=config, notes=[])


APART = "open it by itself"
MOVED = "put it back, or write where it is into adapter_config.json: base_model_name_or_path"


def on_base(adapter: AdapterFolder, base: Path, quantize: Quantize | None, dtype: torch.dtype) -> Loaded:
    """The base with the heads of the adapted model, which the adapter's config.json describes."""
    if not (adapter.folder / "config.json").is_file():  # another program wrote the adapter
        return load_folder(base, quantize=quantize, dtype=dtype)
    _, cfg = read_config(adapter.folder)
    config = read_config_json(adapter.folder)
    if config.get("base_fingerprint", found := fingerprint(base)) != found:
        raise RonnaError(
            f"its base {base} has other weights than it was trained on", where=str(adapter.folder), fix=MOVED
        )
    head = cfg.classifier is None and is_language_model(config)
    loaded = load_folder(base, head=head, classifier=cfg.classifier, quantize=quantize, dtype=dtype)
    return replace(loaded, config=config, notes=[])
