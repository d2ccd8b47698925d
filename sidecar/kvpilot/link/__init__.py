"""The link: how engine and sidecar talk, through files on a memory volume (format version 0)."""
