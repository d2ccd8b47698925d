"""The policy language: load files into typed rules, evaluate them each tick, arbitrate claims into leases.

`load` is the only door from files, `evaluate` the only door from signals; both are pure save for reading files.
"""
