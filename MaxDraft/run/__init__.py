"""Opens a run: its target, data, programs and folder."""
