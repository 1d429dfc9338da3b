"""Conversations in files -> tokens and assistant turns -> packed rows -> this host's batches."""
