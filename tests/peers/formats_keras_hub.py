"""Opens folders of Hugging Face's with KerasHub, in an environment of its own: one job as JSON on the command line."""

import json
import os
import sys

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}

import keras_hub
import numpy as np

job = json.loads(sys.argv[1])
answers = {}
for name, folder in job["folders"].items():
    try:
        model = keras_hub.models.GPT2Backbone.from_preset(folder)
        ids = np.array(job["ids"])
        hidden = model({"token_ids": ids, "padding_mask": np.ones_like(ids)})
        answers[name] = np.array(model.token_embedding(hidden, reverse=True)).tolist()
    except Exception as error:  # whatever KerasHub raises is its answer
        answers[name] = f"{type(error).__name__}: {error}"[:300]
print(json.dumps(answers))
