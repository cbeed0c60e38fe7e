"""The LLaMA model: its configuration, its layers, its head."""
