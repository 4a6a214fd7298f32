"""Process groups, collectives and the routing of rows between models; only this package creates groups."""
