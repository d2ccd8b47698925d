"""A real vLLM to test and measure on: tiny local models, servers, load, leases written by hand."""
