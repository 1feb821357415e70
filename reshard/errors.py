"""What goes wrong, in words for the person who can mend it. Knows nothing about checkpoints."""


class ReshardError(Exception):
    """Usage or refused input: `message` says what, where (tensor, file) and both numbers; `hint` says the remedy."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class MismatchError(ReshardError):
    """Two things that must be equal are not: a verification failed."""

    exit_code = 1


class PlaceError(ReshardError):
    """The machine refused: I/O, space, a lock, the network. A retry may help."""

    exit_code = 3
