"""Command lines: from flags and environment variables to a validated run, and the launch of its processes."""
