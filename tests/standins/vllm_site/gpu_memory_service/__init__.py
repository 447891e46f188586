"""Stand-in for upstream's server package."""
