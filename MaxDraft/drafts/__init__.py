"""The draft head: its parameters, the rollout, the loss and the metrics."""
