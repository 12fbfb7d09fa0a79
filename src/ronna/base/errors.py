"""The one exception for everything a user can mend."""


class RonnaError(Exception):
    """Something the user can put right: what was found, where, and how to mend it.

    The command line prints the message without a traceback and exits with code 2; any other
    exception is our fault and exits with code 1.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        self.said = False  # by another process of the run
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  fix: {self.fix}" if self.fix else head
