"""Completions sampled from the student."""
