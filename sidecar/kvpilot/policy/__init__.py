"""The policy language: load files into typed rules, evaluate them each tick, arbitrate claims into leases.

`load` is the only door from files, `evaluate` the only door from signals. Both are pure, save that the first
reads the files.
"""
