"""Token ids -> more token ids: cache, sampling, the compiled loop. Knows nothing of text."""
