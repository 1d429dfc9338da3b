"""Pure functions on arrays: what target and draft head are made of."""
