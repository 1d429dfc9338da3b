"""A file per family: its config.json as DecoderDims, and how its files name the tensors."""
