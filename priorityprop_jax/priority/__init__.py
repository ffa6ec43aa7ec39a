"""DECIDE: who deserves the budget. Pure Optax; knows no models."""
