"""Token ids -> logits: the Keras layers and the model. Knows nothing of text."""
