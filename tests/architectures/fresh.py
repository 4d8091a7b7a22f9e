"""Loads artifacts as their users do, in a process that made none of them, and measures them against their sources.

Read on standard input: a JSON list of cases, each with the folders of source and artifact, a file of held-back data, a
class of ``transformers`` and an objective. Written on standard output: one JSON object a line, in the same order.
"""

import json
import sys
import traceback

import torch
import transformers
from safetensors.torch import load_file

import octavo  # noqa: F401  (makes from_pretrained understand artifacts)
from octavo.calibration.objective import objective

#: Tokens that a model continues an example by.
TOKENS = 4


def found_in(case):
    """Divergence of an artifact from its source, each loaded by its own class, and what the loader complained of."""
    kind, batches, wanted = (
        getattr(transformers, case["class"]),
        [load_file(case["data"])],
        objective(case["objective"]),
    )
    source = kind.from_pretrained(case["source"], dtype=torch.float32).eval()
    model, info = kind.from_pretrained(case["artifact"], dtype=torch.float32, output_loading_info=True)
    losses = wanted.measure(model.eval(), batches, wanted.reference(source, batches))
    same = None
    if case["generates"]:
        # Random models are sure of nothing, so the source's own tokens show little. The same weights give the same.
        source.load_state_dict(model.state_dict())
        same = agreement(source, model, batches[0])
    keys = {key: sorted(map(str, info[f"{key}_keys"])) for key in ("missing", "unexpected", "mismatched")}
    return {"quality": float(losses.mean()), "generated": same, **keys}


def agreement(source, model, batch):
    """The share of tokens that are the same when both continue two examples."""
    given = {key: value[:2] for key, value in batch.items() if not key.startswith("decoder_")}
    how = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    old, new = (one.generate(**given, **how)[:, -TOKENS:] for one in (source, model))
    return float((old == new).float().mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for case in json.load(sys.stdin):
        try:
            found = found_in(case)
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps(found), flush=True)
