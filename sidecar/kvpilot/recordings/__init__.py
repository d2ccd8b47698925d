"""Rolling recordings of a flight: steps, arrivals and decisions, to be replayed against other policies."""
