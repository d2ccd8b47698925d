"""The journal: what was decided and why, what came of it, and what people ordered. Never prompt text."""
