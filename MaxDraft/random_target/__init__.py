"""Small random targets of many families, in the files in which people have such models."""
