"""Reads what the user asks for: flags, run JSONs, recipes and the checks between them. No torch in here."""
