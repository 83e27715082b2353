"""Code that several test files share: oracles, sample data, launched ranks and recipes."""
