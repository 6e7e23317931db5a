"""Answering: generation, grounding boxes and the web page."""
