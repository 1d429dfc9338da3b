"""Generation with KV caches, plain and speculative."""
