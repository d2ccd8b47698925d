"""The pilot's side of an engine: how it is observed, and how it is acted on."""
