"""Text, from files and hubs to batches of tokens."""
