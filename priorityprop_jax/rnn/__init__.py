"""Lean backward passes over time."""
