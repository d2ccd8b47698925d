"""The flight recorder: what an engine start did last, how it ended, what was decided for it. No prompts."""
