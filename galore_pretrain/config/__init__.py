"""What the user asked for. No torch in here."""
