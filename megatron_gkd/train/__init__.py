"""The run: build the parts, repeat the iteration, save and stop in order."""
