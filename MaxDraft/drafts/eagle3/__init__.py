"""EAGLE-3: one Llama layer that reads captured features of the target."""
