"""Rows longer than what a model is to read at once: one set of words for what is done about them, and one account."""

from collections.abc import Mapping, Sequence

from ronna.base.errors import RonnaError

CUT, WINDOWED, DROPPED = "cut", "windowed", "dropped"
UNFIT = "answers that do not fit"  # they are never cut: their rows teach nothing, but are evaluated and predicted


def keep_rows(
    policy: str,
    long: Mapping[str, Sequence[bool]],
    length: int,
    accounts: dict[str, int] | None,
    *,
    training: bool,
) -> list[bool]:
    """Which rows to keep: all, but for those too long where `policy` is to drop them and they are training rows.

    long: flags of the rows by the word of the account for what befalls a long one that is kept. What is done is
    counted in `accounts`. Raises RonnaError for a long row where `policy` is to refuse them.
    """
    too_long = [any(flags) for flags in zip(*long.values(), strict=True)]
    if policy == "refuse" and any(too_long):
        why = ", ".join(f"{word} {sum(flags)}" for word, flags in long.items() if any(flags))
        what = f"{sum(too_long)} rows are too long for {length} tokens ({why}), the first is row"
        fix = "raise train.length, or choose another task.truncation"
        raise RonnaError(f"{what} {too_long.index(True) + 1}", fix=fix)
    drops = policy == "drop" and training
    count(accounts, {DROPPED: too_long} if drops else long)
    return [not (drops and flag) for flag in too_long]


def count(accounts: dict[str, int] | None, numbers: Mapping[str, Sequence[int]]) -> None:
    """Add up the numbers (or flags) of the rows under each word."""
    if accounts is not None:
        for word, some in numbers.items():
            accounts[word] = accounts.get(word, 0) + sum(some)
