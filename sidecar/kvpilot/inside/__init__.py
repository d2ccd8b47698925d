"""What runs inside engines: standard library alone, no thread, never raises into the engine."""
