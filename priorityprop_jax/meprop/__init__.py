"""Top-k of output gradients."""
