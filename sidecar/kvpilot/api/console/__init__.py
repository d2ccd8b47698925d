"""The console: one read-only page that says what state an engine is in, what is done, and what comes next."""
