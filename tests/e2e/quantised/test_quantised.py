"""Steered answers of quantised models, against Transformers with hooks on the weights that their numbers stand for."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from artifacts.bundle import Bundle, load_bundle

pytestmark = pytest.mark.engine

VOCAB_SIZE, PROMPT_TOKENS, ANSWER_TOKENS = 640, 45, 4


@pytest.fixture(scope="module")
def files(make_bundle: Callable[..., Path], kind_examples: dict[str, dict[str, Any]]) -> dict[str, Path]:
    return {
        kind: make_bundle(kind, [1, 4], 51 + index, [kind_examples[kind]] * 2)
        for index, kind in enumerate(("add", "clamp"))
    }


def test_x(start_server, quantise, files, bundles, make_reference, ask, text_tokens) -> None:
    import time, os
    loaded = {**bundles, **{n: load_bundle(p) for n, p in files.items()}}
    for name, flags in {
        "gptq": ["--dtype", "float16", "--enforce-eager"], "awq": ["--dtype", "float16", "--enforce-eager", "--steering-fusion", "always"],
        "int8": ["--enforce-eager"], "fp8": [],
    }.items():
        q = quantise(name)
        reference = make_reference(loaded)
        for m, w in q.weights.items():
            module = reference._model.get_submodule(m)
            module.weight.data.copy_(w)
            if q.activation: module.register_forward_pre_hook(lambda _m, a: (q.activation(a[0]),))
        t = time.time()
        with start_server(name, "--steering-bundle", *map(str, files.values()), "--steering-fingerprint", "ignore", *flags, "--max-num-seqs", "40", model=q.folder) as server:
            up = time.time() - t
            (w,) = server.steering_status()
            print("\n"+name, f"up {up:.0f}", {k: w[k] for k in ("fused_layers", "in_place_layers")})
            T = lambda n, s="all", k=1.0: {"name": n, "strength": k, "scope": s}
            reqs = [(p, terms) for p in range(3) for terms in ([], [T("add")], [T("add", "response")], [T("clamp")], [T("clamp", "prompt")], [T("clamp"), T("add", "response", -1.0)], [T("careful","all",0.8)], [T("every","all",.5)])]
            def run(r):
                p, terms = r
                return ask(server, text_tokens[p*100:p*100+45], None if not terms else terms if len(terms) > 1 else terms[0], max_tokens=4, logprobs=640)
            for (p, terms), a in zip(reqs, server.map(run, reqs)):
                served = torch.tensor([[row[t] for t in range(640)] for row in a.logprobs])
                toks = [*text_tokens[p*100:p*100+45], *a.tokens[:-1]]
                e, u = (reference.logprobs(toks, 45, x)[44:] for x in (terms, []))
                d = (served - e).abs(); ef = (e - u).abs()
                print(f"  {p} max {d.max():.2e} mean {d.mean():.2e} effect {ef.max():.2f} {ef.mean():.2f}", [(x["name"], x["scope"], x["strength"]) for x in terms])
