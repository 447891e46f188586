"""Stand-in for the engine."""
