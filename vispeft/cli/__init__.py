"""The command line: one module per command, each with a ``main``; ``vispeft.cli.main`` finds them by name."""
