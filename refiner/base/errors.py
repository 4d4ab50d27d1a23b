"""The errors that a user can mend: the command line says them in one line, without a traceback."""


class UserError(ValueError):
    """Something that the caller can mend; its message is one sentence that says how."""


class NotFinite(UserError, FloatingPointError):
    """A training whose loss or weights became NaN or infinite; the states saved before stay."""


class MissingPackage(UserError, ModuleNotFoundError):
    """An optional package is not installed; the message says how to install it."""


class TooFew(UserError):
    """A set has fewer images than were asked for; ``asked`` says how many that were."""

    def __init__(self, message: str, asked: int):
        super().__init__(message)
        self.asked = asked


class Damaged(UserError):
    """A file that is incomplete, was changed, or is of another kind than its name says."""
