"""Names of inner values, how they are read while they are computed, and how they are changed."""
