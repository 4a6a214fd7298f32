"""The losses against float64: a reference that shares no code with them, and certificates of a run's own loss."""
