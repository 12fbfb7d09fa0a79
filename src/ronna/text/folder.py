"""Reading and writing tokenizers as everyone else keeps them: Hugging Face folders.

Only data is read (JSON, plain vocabularies, sentencepiece protobufs). Classes that a folder names are
never imported; `tokenizer_class` only tells which published recipe the bare vocabulary files need.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ronna.base.config import build
from ronna.base.errors import RonnaError
from ronna.text import unigram
from ronna.text.settings import Settings, content

Side = Literal["source", "target"]

ROLES = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")
CONVERT = (
    "convert it once with `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` of transformers, "
    "which writes the tokenizer.json read here"
)

# Where nothing says which token plays which role, these names are common knowledge.
KNOWN_ROLES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}
GPT2 = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
QWEN2 = {"pad": "<|endoftext|>", "eos": "<|endoftext|>"}
BERT = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "unk": "[UNK]"}
ROBERTA = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "mask": "<mask>", "unk": "<unk>"}
ROBERTA |= {"cls": "<s>", "sep": "</s>"}
MARIAN = ("source.spm", "target.spm", "vocab.json")
T5 = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}

# https://github.com/QwenLM/Qwen2.5, tokenizer.json: Llama 3's pattern with single digits.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenizerParts:
    """What a tokenizer folder says: `backend` makes ids, the rest tells others how to use them.

    `decoder` stands in for `backend` when ids turn back into text (Marian has one vocabulary, but
    cuts source and target language differently); `files` are originals to be written back as they were.
    """

    backend: tokenizers.Tokenizer
    roles: Mapping[str, str]
    max_length: int | None = None
    chat_template: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    decoder: tokenizers.Tokenizer | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def read_json(path: Path) -> Any:
    """The JSON document in `path`; RonnaError with line and column where it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RonnaError(
            f"not valid JSON: {error.msg}",
            where=f"{path}:{error.lineno}:{error.colno}",
            fix="download or copy the file again; it looks cut or edited",
        ) from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise RonnaError(f"not a JSON text file: {error}", where=str(path), fix="copy it again") from None


def read_folder(path: Path, side: Side = "source") -> TokenizerParts:
    """Read a tokenizer folder, or one `tokenizer.json`.

    Raises RonnaError when there is nothing to read, when a file is broken, and when only a recipe
    this room does not know would make sense of the files.
    """
    if not path.exists():
        raise RonnaError("no such file or folder", where=str(path), fix="give the folder of a model or tokenizer")
    if path.is_file() and path.suffix != ".json":
        raise RonnaError("not a tokenizer file", where=str(path), fix="give a tokenizer.json or its folder")
    folder, main = (path.parent, path) if path.is_file() else (path, path / "tokenizer.json")
    config = _described(folder)
    recipe: dict[str, str] = {}
    if main.is_file():
        backend = _from_json(main)
    elif all((folder / name).is_file() for name in MARIAN):
        return _marian(folder, config, side)
    else:
        backend, recipe = _from_vocabulary(folder, config)
    _add_described_tokens(backend, config)
    named = _roles(config, folder)
    roles = {**recipe, **named} if recipe else named or _known_roles(backend)
    # transformers makes every token with a role special, and gives ids to those that have none.
    added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([t for t in dict.fromkeys(roles.values()) if t not in added])
    if recipe:
        _apply_bos_eos(backend, config, roles)
    return TokenizerParts(backend, roles, _max_length(config), _chat_template(folder, config), config)


def write_folder(folder: Path, parts: TokenizerParts) -> None:
    """Write what `transformers.AutoTokenizer` needs to give the same ids."""
    folder.mkdir(parents=True, exist_ok=True)
    roles = {f"{role}_token": token for role, token in parts.roles.items()}
    config = {**parts.config, **roles}
    config["model_max_length"] = parts.max_length if parts.max_length is not None else int(1e30)
    for stale in ("chat_template", "auto_map"):
        config.pop(stale, None)
    if parts.chat_template is not None:
        config["chat_template"] = parts.chat_template
    for name, original in parts.files.items():
        (folder / name).write_bytes(original)
    if not parts.files:
        (folder / "tokenizer.json").write_text(parts.backend.to_str(pretty=True), encoding="utf-8")
    for name, document in (("tokenizer_config.json", config), ("special_tokens_map.json", roles)):
        text = json.dumps(document, ensure_ascii=False, indent=2, sort_keys=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _from_json(path: Path) -> tokenizers.Tokenizer:
    document = read_json(path)
    if not isinstance(document, dict) or "model" not in document:
        raise RonnaError(
            'JSON, but no tokenizer: the key "model" is missing',
            where=str(path),
            fix="give the file that is called tokenizer.json in a Hugging Face folder",
        )
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(document))
        backend.no_truncation()
        backend.no_padding()
        for texts in ([""], [("", "")]):
            backend.encode_batch(texts)  # templates may name tokens that are not there
        return backend
    except BaseException as error:  # the library raises bare Exception, and panics that are not even that
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RonnaError(
            f"the tokenizers library refuses this tokenizer: {error}", where=str(path), fix=CONVERT
        ) from None


def _from_vocabulary(folder: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Folders older than tokenizer.json: the published recipe around the bare vocabulary."""
    names = {file.name for file in folder.iterdir()}
    kind = str(config.get("tokenizer_class") or config.get("model_type") or "")
    kind = kind.removesuffix("Fast").removesuffix("Tokenizer").lower()
    if "vocab.txt" in names:
        return _bert(folder / "vocab.txt", config), BERT
    if {"vocab.json", "merges.txt"} <= names and kind in ("", "gpt2", "roberta", "bart", "qwen2"):
        backend = _byte_level(folder, kind)
        return backend, {"qwen2": QWEN2, "roberta": ROBERTA, "bart": ROBERTA}.get(kind, GPT2)
    if "spiece.model" in names and kind in ("t5", "mt5"):
        model = unigram.read(folder / "spiece.model")
        return unigram.t5_backend(model, int(config.get("extra_ids", 100))), T5
    found = sorted(n for n in names if n.endswith((".model", ".spm", ".tiktoken")) or n.startswith("vocab"))
    if found:
        raise RonnaError(
            f"no tokenizer.json, and {', '.join(found)} ({kind or 'of no known class'}) cannot be read here",
            where=str(folder),
            fix=CONVERT,
        )
    raise RonnaError(
        "the folder holds no tokenizer (tokenizer.json, vocab.txt, vocab.json with merges.txt)",
        where=str(folder),
        fix="copy the tokenizer files of the model into it, or train one with `ronna tokenizer train`",
    )


def _bert(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    lines = path.read_text(encoding="utf-8").split("\n")
    vocab = {token.rstrip("\r"): i for i, token in enumerate(lines) if token or i < len(lines) - 1}
    unk, cls, sep = (content(config.get(f"{role}_token")) or BERT[role] for role in ("unk", "cls", "sep"))
    missing = [token for token in (unk, cls, sep) if token not in vocab]
    if missing:
        raise RonnaError(
            f"the vocabulary lacks {', '.join(missing)}",
            where=str(path),
            fix="name the tokens in these roles in tokenizer_config.json: unk_token, cls_token, sep_token",
        )
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars") is not False,
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case") is not False,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    return backend


def _byte_level(folder: Path, kind: str) -> tokenizers.Tokenizer:
    vocab = read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    except Exception as error:  # the library raises bare Exception
        raise RonnaError(
            f"vocab.json and merges.txt do not belong together: {error}",
            where=str(folder),
            fix="copy both from the same model",
        ) from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind in ("roberta", "bart"):
        around = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            special_tokens=[(token, vocab[token]) for token in ("<s>", "</s>")],
        )
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), around])
        backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _pair(line: str) -> tuple[str, str]:
    left, _, right = line.partition(" ")
    return left, right


def _marian(folder: Path, config: Mapping[str, Any], side: Side) -> TokenizerParts:
    if config.get("separate_vocabs"):
        raise RonnaError(
            "a Marian tokenizer with two vocabularies is not supported",
            where=str(folder),
            fix="use a model whose source and target share one vocabulary",
        )
    vocab = read_json(folder / "vocab.json")
    roles = {**T5, **_roles(config, folder)}
    model = unigram.read(folder / f"{side}.spm")
    backend = unigram.marian_backend(model, vocab, roles)
    files = {name: (folder / name).read_bytes() for name in MARIAN}
    settings = {"tokenizer_class": "MarianTokenizer", **config}
    decoder = unigram.marian_decoder(vocab, roles)
    return TokenizerParts(backend, roles, _max_length(config) or 512, None, settings, decoder, files)


def _described(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; where it names no class, the model_type of config.json."""
    model = _object(folder / "config.json")
    named = {"model_type": model["model_type"]} if "model_type" in model else {}
    return named | _settings(folder / "tokenizer_config.json")


def _object(path: Path) -> dict[str, Any]:
    document = read_json(path) if path.is_file() else {}
    if not isinstance(document, dict):
        raise RonnaError("expected a JSON object", where=str(path), fix="copy the file again")
    return document


def _settings(path: Path) -> dict[str, Any]:
    document = _object(path)
    build(Settings, document, where=str(path))
    return document


def _roles(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    fallback = _settings(folder / "special_tokens_map.json")
    named = ((role, content(config.get(f"{role}_token", fallback.get(f"{role}_token")))) for role in ROLES)
    return {role: token for role, token in named if token}


def _known_roles(backend: tokenizers.Tokenizer) -> dict[str, str]:
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    found = ((role, next((n for n in names if n in special), None)) for role, names in KNOWN_ROLES.items())
    return {role: name for role, name in found if name}


def _add_described_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json knows, in the order of the ids it gives them."""
    have = backend.get_vocab(with_added_tokens=True)
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    described = config.get("added_tokens_decoder") or {}
    for _, token in sorted(described.items(), key=lambda item: int(item[0])):
        if token["content"] not in have:
            chosen = {flag: token[flag] for flag in flags if token.get(flag) is not None}
            special = token.get("special") is not False
            backend.add_tokens([AddedToken(token["content"], special=special, **chosen)])
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    names = [content(t) for t in (extra.values() if isinstance(extra, dict) else extra)]
    backend.add_special_tokens([name for name in names if name and name not in have])


def _apply_bos_eos(backend: tokenizers.Tokenizer, config: Mapping[str, Any], roles: Mapping[str, str]) -> None:
    """`add_bos_token` and `add_eos_token`, which count where no tokenizer.json has a template of its own."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos, eos = (roles.get(r) if config.get(f"add_{r}_token") else None for r in ("bos", "eos"))
    ends = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    if backend.encode("").ids == [i for _, i in ends]:
        return
    single, pair = (
        " ".join(f"{t}:{segment}" for t in (bos, variable, eos) if t) for segment, variable in ((0, "$A"), (1, "$B"))
    )
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} {pair}", special_tokens=list(dict(ends).items())
    )


def _max_length(config: Mapping[str, Any]) -> int | None:
    length = config.get("model_max_length")
    # transformers writes 1e30 for "no limit".
    return int(length) if length is not None and 0 < length < 1e9 else None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
