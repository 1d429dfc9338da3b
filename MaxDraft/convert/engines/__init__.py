"""Which engine can serve a head, with evidence."""
