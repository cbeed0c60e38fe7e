"""A training run's parts: loop, execution, schedule, evaluation, metrics."""
