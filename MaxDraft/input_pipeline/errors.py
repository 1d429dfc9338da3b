"""Errors in the data that a user can mend; each message names what to do next."""

from MaxDraft.errors import UserError


class DataError(UserError):
    """The data, the tokenizer or its chat template cannot be used as they are."""


class TemplateError(DataError):
    """One conversation that the chat template cannot render, or whose replies cannot be located."""
