"""Memory and traffic of a run before it is made."""
