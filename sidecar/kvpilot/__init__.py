"""kvpilot keeps LLM inference engines out of trouble. This package imports nothing by itself."""
