"""Command line: flags to a validated `Run`."""
