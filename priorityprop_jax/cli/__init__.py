"""The command `priorityprop`."""
