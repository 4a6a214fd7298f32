"""What the teacher says about every row of a batch, whatever runs it."""
