"""The ground floor of numerics: chunks, rounding, shards, products. Imports nothing else of this package."""
