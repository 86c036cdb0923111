"""`python -m stiffcore`: the command line, where the script is not on the path."""

from stiffcore.cli import main

if __name__ == "__main__":
    main()
