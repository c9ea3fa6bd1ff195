"""Text -> text: completions, conversations, perplexity."""
