"""`python -m rankwise` is the command line."""

from rankwise.cli.main import main

main()
