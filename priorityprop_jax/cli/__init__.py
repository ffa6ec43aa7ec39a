"""The command `priorityprop`: train, fine-tune, and report what was spent on what."""
