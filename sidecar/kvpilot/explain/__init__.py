"""Why a decision was made: from the journal, which outlives the pilot, and from the pilot, while it flies."""
