"""`python -m kvengine` is the `kvengine` command."""

from kvengine.cli import main

main()
