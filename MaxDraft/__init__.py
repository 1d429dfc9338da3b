"""MaxDraft trains EAGLE-3 draft heads for speculative decoding, in JAX."""
