"""Loads artifacts as their users do, in a process that made none of them, and measures them against their sources.

Read on standard input: a JSON list of cases, each with the folders of source and artifact, a file of held-back batches
and the objective's name and pooling. Written on standard output: one JSON line a case.
"""

import json
import sys
import traceback

import torch
import transformers
from safetensors.torch import load_file

import octavo
from octavo.integrations.tasks import class_for
from octavo.objective import Cosine, objective

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def measured(case):
    """Divergence of an artifact from its source, each loaded by its own class, and what the loader complained of."""
    assert octavo.__version__
    kind = class_for_name(case)
    batch = load_file(case["batch"])
    wanted = Cosine(case["pooling"]) if case["objective"] == "cosine" else objective(case["objective"])
    source = kind.from_pretrained(case["source"], dtype=torch.float32).eval()
    model, info = kind.from_pretrained(case["artifact"], dtype=torch.float32, output_loading_info=True)
    losses = wanted.measure(model.eval(), [batch], wanted.reference(source, [batch]))
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {
        "class": kind.__name__,
        "quality": float(losses.mean()),
        **{key: sorted(map(str, info[key])) for key in keys},
    }


def class_for_name(case):
    return getattr(transformers, case["class"]) if case.get("class") else class_for(case["artifact"])


for case in json.load(sys.stdin):
    try:
        found = measured(case)
    except Exception:
        found = {"error": traceback.format_exc()}
    print(json.dumps(found), flush=True)
