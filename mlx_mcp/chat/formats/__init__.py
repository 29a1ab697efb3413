"""What the models of each family write: the markers of their thoughts, and the notation of their tool calls."""
