"""Memory, traffic and time of a run before it is made."""
