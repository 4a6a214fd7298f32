"""Who owns which slice of which weight, and how slices travel between layouts."""
