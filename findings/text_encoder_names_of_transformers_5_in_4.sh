#!/usr/bin/env bash
# Versions: transformers 5.24.0 writes, transformers 4.57.1 reads; torch 2.14.1 (CPU), Python 3.11 to 3.13.
#
# Guess: a CLIPTextModel that transformers 5 saves is read by transformers 4, as the format, the class
# and the config are the same; if weights were missing, loading would fail.
#
# Behaviour: version 5 flattened the class and writes `embeddings…`, `encoder…`, `final_layer_norm…`. Version 4
# looks for `text_model.embeddings…`, finds none of the weights, initializes all of them at random, prints a
# page of log, and goes on. Only a text encoder saved alone or in a Stable Diffusion folder is affected;
# CLIPTextModelWithProjection keeps its prefix. Version 5 reads the names with the prefix bit by bit.
#
# Output seen: see EXPECTED below.
#
# Why it matters: most trainers and interfaces of Stable Diffusion still pin transformers 4. A model exported by a
# newer program loads there and ignores every prompt. Write the `text_model.` prefix: both read it.
set -euo pipefail
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
install=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${install[@]}" torch==2.14.1 numpy==2.4.6 transformers==5.24.0 2>/dev/null
"${install[@]}" --target "$work/four" transformers==4.57.1 huggingface_hub==0.36.0 tokenizers==0.22.1 2>/dev/null

cat > "$work/probe.py" <<'PROBE'
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

transformers.logging.set_verbosity_error()
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
major = transformers.__version__.split(".")[0]
if sys.argv[1] == "write":
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=99, **size)).eval()
    model.save_pretrained("plain")
    model.save_pretrained("prefixed")
    weights = load_file("plain/model.safetensors")
    save_file({f"text_model.{n}": w for n, w in weights.items()}, "prefixed/model.safetensors", {"format": "pt"})
    with torch.no_grad():
        save_file({"hidden": model(TOKENS)[0]}, "hidden.safetensors")
    print("written by", major, sorted(weights)[0])
else:
    for folder in ("plain", "prefixed"):
        torch.manual_seed(1)
        model, report = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
        with torch.no_grad():
            equal = torch.equal(model.eval()(TOKENS)[0], load_file("hidden.safetensors")["hidden"])
        missing = sum("position_ids" not in name for name in report["missing_keys"])
        print(f"{folder} read by {major}: {missing} of 36 weights missing, hidden states equal: {equal}")
PROBE

cat > "$work/expected" <<'EXPECTED'
written by 5 embeddings.position_embedding.weight
plain read by 5: 0 of 36 weights missing, hidden states equal: True
prefixed read by 5: 0 of 36 weights missing, hidden states equal: True
plain read by 4: 36 of 36 weights missing, hidden states equal: False
prefixed read by 4: 0 of 36 weights missing, hidden states equal: True
EXPECTED

cd "$work"
{
    venv/bin/python probe.py write
    venv/bin/python probe.py read
    PYTHONPATH="$work/four" venv/bin/python probe.py read
} 2>stderr | tee seen || { cat stderr; exit 1; }
diff expected seen && echo "as described"
