"""What no chip has run yet: tested by interpretation and compiled for its device, but not timed."""
