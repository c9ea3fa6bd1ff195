"""Opens and writes folders with transformers, in an environment of its own: jobs on standard input, one JSON a line."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model

torch.set_num_threads(1)


def write(job):
    """Writes a random model as transformers does; returns its logits."""
    torch.manual_seed(job["seed"])
    config = GPT2Config(**job["config"], bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():  # no zero biases and unit gains, and weights so large that all curves
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.to(getattr(torch, job.get("dtype", "float32")))
    if job.get("base"):
        base = GPT2Model(config).eval()
        base.load_state_dict(model.transformer.state_dict())
        base.save_pretrained(job["folder"])
    elif job.get("pickle"):
        config.save_pretrained(job["folder"])
        torch.save(model.state_dict(), f"{job['folder']}/pytorch_model.bin")
    else:
        model.save_pretrained(job["folder"], max_shard_size=job.get("max_shard_size", "5GB"))
    return logits(model.float(), job["ids"])


def read(job):
    """Returns the logits of a folder that another program wrote."""
    model, info = AutoModelForCausalLM.from_pretrained(job["folder"], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return logits(model.eval(), job["ids"])


def attempt(job):
    """Returns the logits of a folder, or of a GGUF file in it, as far as transformers can; or its error."""
    try:
        model = AutoModelForCausalLM.from_pretrained(job["folder"], gguf_file=job["gguf_file"])
    except Exception as error:  # whatever transformers raises is its answer
        return f"{type(error).__name__}: {error}"[:300]
    return logits(model.eval(), job["ids"])


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.tolist()


def tokenize(job):
    """Encodes and decodes texts."""
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]]
    plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return {"ids": rows, "texts": [tokenizer.decode(row, **plain) for row in rows], "end": tokenizer.eos_token_id}


def add_tokens(job):
    """Adds tokens to the tokenizer in a folder, and writes it to another."""
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|user|>", "<|bot|>"]})
    tokenizer.add_tokens(["newword", "two words"])
    tokenizer.save_pretrained(job["to"])
    return len(tokenizer)


TASKS = {"write": write, "read": read, "attempt": attempt, "tokenize": tokenize, "add_tokens": add_tokens}
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps(TASKS[job.pop("task")](job)), flush=True)
