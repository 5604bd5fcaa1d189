"""What a step moves and computes, and how long that takes at least."""
