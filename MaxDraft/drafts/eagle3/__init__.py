"""EAGLE-3: one Llama layer that reads aux hidden states of the target."""
