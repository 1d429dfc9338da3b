"""The embedded default's target: made here, from text that every Python installation carries."""
