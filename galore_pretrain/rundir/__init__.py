"""What a run leaves: checkpoints, config, summary, exported model; and how it is taken up again."""
