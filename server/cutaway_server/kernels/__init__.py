"""The operations of a transformer: a plain-torch reference, and faster twins chosen once at start."""
