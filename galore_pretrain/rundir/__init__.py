"""Writes what a run leaves (checkpoints, config, summary, exported model) and takes a run up again."""
