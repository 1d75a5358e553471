"""General text and domain tasks, as rows of tokens."""
