"""The link: how engine and sidecar talk, through files on a memory volume. `docs/link.md` has the format."""
