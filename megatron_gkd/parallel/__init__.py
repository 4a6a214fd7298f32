"""Process groups, collectives and the routing of rows between models. The only owner of communication."""
