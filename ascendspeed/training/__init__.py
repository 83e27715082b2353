"""Training loop, engines and fault tolerance."""
