"""`python -m kvpilot`: the same as `kvpilot`."""

from kvpilot.cli import main

if __name__ == "__main__":
    main()
