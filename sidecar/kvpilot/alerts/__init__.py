"""Alerts for people: what a rule's `notify` and the pilot's own troubles become, and how they get there."""
