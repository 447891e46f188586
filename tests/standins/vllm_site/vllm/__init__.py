"""Stand-in: only its presence is looked at."""
