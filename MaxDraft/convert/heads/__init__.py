"""Heads in the files that serving engines read, and the way back."""
