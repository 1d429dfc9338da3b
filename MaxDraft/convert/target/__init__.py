"""The target checkpoint: its files, what quantized tensors mean, reading straight to shards."""
