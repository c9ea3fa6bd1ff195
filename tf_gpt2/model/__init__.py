"""Token ids -> logits: the Keras layers and the model. Knows nothing of text."""

from tf_gpt2.runtime import compile_cache, memory

# here, because both must come before TensorFlow's first operation
compile_cache.enable()
memory.give_memory_back()
