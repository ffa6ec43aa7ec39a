"""SPEND: backward passes that cost less."""
