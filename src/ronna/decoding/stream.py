"""Text from tokens as they come: never half a character, never past a stop string."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

UNFINISHED = "\ufffd"  # what decoders show for bytes that are no character, or not yet
PATIENCE = 8  # tokens in sight before bytes that make no character are taken for broken ones


class Detokenizer:
    """Turns tokens into text one by one, at a cost that does not grow with what came before.

    Only the tokens since the last whole character are decoded again, and those that ended there: whether a
    word stands behind a space shows only in company.
    """

    def __init__(self, decode: Decode):
        self.decode = decode
        self.context: list[int] = []
        self.pending: list[int] = []
        self.given = 0  # characters of decode(context + pending) that are already out

    def push(self, token: int) -> str:
        """The text that `token` makes certain; "" in the middle of a character."""
        self.pending.append(token)
        window = self.context + self.pending
        text = self.decode(window)
        whole = len(text.rstrip(UNFINISHED))
        if whole < len(text):
            return self._give(text, whole) if len(window) <= PATIENCE else self._let_go(window, text, whole)
        piece = self._give(text, whole)
        # Without text of its own a token, special ones first of all, must not part words from their context.
        if piece:
            self.context = self.pending
        elif not self.given:
            self.context = window[-PATIENCE:]
        self.pending, self.given = [], len(self.decode(self.context))
        return piece

    def close(self) -> str:
        """The rest, broken characters included."""
        text = self.decode(self.context + self.pending)
        return self._give(text, len(text))

    def _give(self, text: str, end: int) -> str:
        piece = text[self.given : end]
        self.given = max(self.given, end)
        return piece

    def _let_go(self, window: list[int], text: str, whole: int) -> str:
        """Give out broken bytes, where the tokens may be parted without cutting a character in two."""
        # A character has at most four bytes, so three tokens hold whatever may still be completed.
        for cut in range(len(window) - 3, len(window) - 7, -1):
            head = self.decode(window[:cut])
            if head + self.decode(window[cut:]) == text:
                piece = self._give(text, max(whole, len(head)))
                self.context, self.pending, self.given = [], window[cut:], self.given - len(head)
                return piece
        return self._give(text, whole)


class TextStream:
    """The text of one sequence up to the first stop string, given out as soon as it cannot be part of one."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()):
        self.detokenizer = Detokenizer(decode)
        self.stop = stop
        self.longest = max(map(len, stop), default=0)
        self.given: list[str] = []
        self.held = ""
        self.stopped = False

    @property
    def text(self) -> str:
        return "".join(self.given)

    def push(self, token: int) -> str:
        """The text that may be shown now; `stopped` tells whether a stop string has come."""
        return self._release(self.detokenizer.push(token), last=False)

    def close(self) -> str:
        """What was held back, when no token follows."""
        return self._release(self.detokenizer.close(), last=True)

    def _release(self, piece: str, last: bool) -> str:
        if self.stopped:
            return ""
        self.held += piece
        found = [place for stop in self.stop if (place := self.held.find(stop)) >= 0]
        end = len(self.held)
        if found:
            self.stopped, end = True, min(found)
        elif not last:
            end -= self._may_begin_a_stop()
        piece, self.held = self.held[:end], self.held[end:]
        self.given.append(piece)
        return piece

    def _may_begin_a_stop(self) -> int:
        """Length of the longest end of `held` that some stop string starts with."""
        sizes = range(min(len(self.held), self.longest - 1), 0, -1)
        return next((n for n in sizes if any(s.startswith(self.held[-n:]) for s in self.stop)), 0)
