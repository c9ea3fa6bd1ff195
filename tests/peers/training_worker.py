"""Runs in Hugging Face's environment: loss and gradients of GPT-2, and adapters by PEFT. Talks by files in a folder.

python training_worker.py gradients FOLDER    params.npz, batch.npz, hparams.json -> gradients.npz
python training_worker.py load FOLDER         the same, adapter/ -> logits.npy
python training_worker.py save FOLDER         the same, lora.json -> made/, logits.npy
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.peers.huggingface import HuggingFace, state_name
from benchmarks.peers.protocol import iter_arrays

task, folder = sys.argv[1], Path(sys.argv[2])
peer = HuggingFace(folder, "float32", 2)
torch.set_grad_enabled(True)
model, batch = peer.model, {name: torch.from_numpy(array) for name, array in np.load(folder / "batch.npz").items()}

if task == "gradients":
    # Hugging Face moves the labels by one itself: the first is not asked for
    labels = torch.cat([torch.full_like(batch["labels"][:, :1], -100), batch["labels"]], dim=1)
    ids = torch.cat([batch["ids"], batch["ids"][:, :1]], dim=1)
    loss = model(ids, labels=labels).loss
    loss.backward()
    parameters = dict(model.transformer.named_parameters())
    gradients = {path: parameters[state_name(path)].grad.numpy() for path, _ in iter_arrays(folder)}
    np.savez(folder / "gradients.npz", loss=loss.item(), **gradients)
else:
    if task == "load":
        model = PeftModel.from_pretrained(model, folder / "adapter")
    else:
        options = json.loads((folder / "lora.json").read_text())
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / "made")
    with torch.no_grad():
        np.save(folder / "logits.npy", model.eval()(batch["ids"]).logits.numpy())
