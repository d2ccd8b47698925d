"""How the outside reaches the pilot: read-only HTTP for everybody, a unix socket for those who operate it."""
