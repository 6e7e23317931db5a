"""Measures load, speed and memory beside the machine's own limits, see README.md here."""
