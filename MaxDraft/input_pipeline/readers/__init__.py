"""Readers: the forms in which people keep conversations -> `Conversation`.

files.py     a file by what it is (plain or gzip JSON lines) -> its lines
records.py   one line by its columns ("messages", "conversations") -> messages
"""
