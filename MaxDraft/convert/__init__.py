"""Files in, files out: safetensors, the serving engines' dialect."""
