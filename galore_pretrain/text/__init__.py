"""From files and hubs to batches of tokens."""
