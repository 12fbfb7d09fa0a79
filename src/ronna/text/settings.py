"""What the files beside a tokenizer must hold where they are read: a damaged one is named at the door."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Keys that nobody reads here may hold anything."""

    model_config = ConfigDict(frozen=True, extra="allow")


class NamedToken(Part):
    content: str


Token = str | NamedToken
Switch = bool | None


class AddedToken(NamedToken):
    special: Switch = None
    single_word: Switch = None
    lstrip: Switch = None
    rstrip: Switch = None
    normalized: Switch = None


class NamedTemplate(Part):
    name: str
    template: str


class Settings(Part):
    """Of tokenizer_config.json and special_tokens_map.json."""

    tokenizer_class: str | None = None
    model_max_length: int | float | None = None
    chat_template: str | list[NamedTemplate] | None = None
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], AddedToken] | None = None
    additional_special_tokens: list[Token] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None
    pad_token: Token | None = None
    bos_token: Token | None = None
    eos_token: Token | None = None
    cls_token: Token | None = None
    sep_token: Token | None = None
    mask_token: Token | None = None
    unk_token: Token | None = None
    add_bos_token: Switch = None
    add_eos_token: Switch = None
    do_lower_case: Switch = None
    tokenize_chinese_chars: Switch = None
    strip_accents: Switch = None
    separate_vocabs: Switch = None
    extra_ids: int = Field(100, ge=0, le=100_000)


def content(token: Any) -> str | None:
    """A token as it is written: by itself, or as the `content` of an object."""
    return token.get("content") if isinstance(token, dict) else token
