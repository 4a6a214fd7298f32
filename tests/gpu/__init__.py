"""Tests that need a CUDA device; ``make gpu`` runs them, nothing else collects them."""
