"""Opens a GGUF file with llama-cpp-python, in an environment of its own: one job as JSON on the command line."""

import json
import sys

import llama_cpp

job = json.loads(sys.argv[1])
model = llama_cpp.Llama(job["file"], n_ctx=0, n_threads=1, verbose=False, flash_attn=False)
rows = []
for prompt in job["prompts"]:
    model.reset()
    new = []
    for token in model.generate(prompt, temp=0.0, top_k=1):
        if len(new) == job["max_new_tokens"]:
            break
        new.append(token)
    rows.append(new)
tokens = [model.tokenize(text.encode(), add_bos=False, special=True) for text in job["texts"]]
print(json.dumps({"ids": rows, "tokens": tokens, "texts": [model.detokenize(row).decode() for row in tokens]}))
