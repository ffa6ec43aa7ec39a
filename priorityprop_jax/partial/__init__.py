"""Gradients, optimizer state and forward passes of what is trained, only."""
