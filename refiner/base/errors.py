"""The error that a user can mend."""


class UserError(ValueError):
    """Something that the caller can mend; its message is one sentence that says how."""
