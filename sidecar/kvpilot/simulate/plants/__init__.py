"""Plants: what stands in for the model's forward pass in virtual time.

A plant and the pilot share the names of the step record's fields and nothing else: nothing here imports
`kvpilot.forecast`, and nothing there imports this (a test holds both).
"""
