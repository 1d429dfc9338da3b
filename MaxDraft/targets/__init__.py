"""The frozen target: one decoder, and a short file per model family."""
