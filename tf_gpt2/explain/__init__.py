"""Shows a model's view of a text: each token's probability, the likelier ones, and where attention went."""
