"""What the outside sees of the pilot: the last tick, described for status, metrics and terminals."""
