"""Workloads: trace readers, a seeded generator and open-loop clients, for the demo, benches and
simulation."""
