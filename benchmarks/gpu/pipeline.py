"""One block of the authors' pipeline, stage by stage: what whole models are extrapolated from."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.authors import AuthorsOptions, authors_fasterprune, authors_gram
from benchmarks.gpu import holding
from benchmarks.gpu.plan import DENSITY, PERCDAMP, Data, Model
from benchmarks.gpu.run import Run
from benchmarks.gpu.table import Row

PASSES = 2  # they run a block once to take its Grams and once more to hand its answers on
MEASURED = 4  # sequences whose passes and Grams are timed; all of them take so many times as long
PROVIDER = "authors, eager"


def authors_block(run: Run, model: Model, data: Data) -> Iterator[Row]:
    """Rows of one block by stage, in float32 as their code runs; the last row is their sum.

    Passes and Grams are linear in the sequences, so a few are timed and multiplied; the sweeps are
    timed in full, once for each of the seven linears.
    """
    measured = min(MEASURED, data.sequences)
    scale = data.sequences / measured
    many = f"{measured} of {data.sequences} sequences timed" if scale > 1 else ""
    forward = run.clock.medians({"pass": _pass(run, model, measured, data.tokens)}, rounds=3)[
        "pass"
    ]
    stages = {"passes": (PASSES * forward * scale, many)}
    grams = 0.0
    for key, linear in enumerate(model.linears):
        # One Gram per linear: layers that share an input do not share it there.
        x = holding.inputs(run, measured * data.tokens, linear.cols, torch.float32, key)
        batches = list(x.split(data.tokens))
        grams += run.clock.medians({"gram": partial(authors_gram, batches)}, rounds=2)["gram"]
    stages["Grams"] = (grams * scale, many)
    stages["fasterprune"] = (_sweeps(run, model), "each linear timed once")
    shape = f"{model.name} block, {data}"
    for name, (seconds, note) in stages.items():
        row = Row(f"authors {name}", shape, "float32", PROVIDER, seconds=seconds)
        yield replace(row, note=note)
    total = sum(seconds for seconds, _ in stages.values())
    yield Row("authors block", shape, "float32", PROVIDER, seconds=total, note=many)


def _pass(run: Run, model: Model, sequences: int, tokens: int) -> partial[None]:
    """One block's forward passes, sequence by sequence, by transformers' own layer."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8,  # the embedding is not run
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=1,
        num_attention_heads=model.heads,
        dtype=torch.float32,
    )
    with run.device:
        layer = LlamaModel(config).eval()
    x = run.normal(sequences, tokens, model.hidden, generator=run.generator(11))
    return partial(_forward, layer, x)


@torch.no_grad()
def _forward(layer: torch.nn.Module, x: torch.Tensor) -> None:
    for sequence in x:
        layer(inputs_embeds=sequence[None], use_cache=False)


def _sweeps(run: Run, model: Model) -> float:
    options = AuthorsOptions(sparsity=1 - DENSITY, percdamp=PERCDAMP)
    base, tuned = (torch.randn(8, 128, device=run.device) for _ in range(2))
    authors_fasterprune(base, tuned, torch.eye(128, device=run.device), options)  # warm
    grams = {
        name: authors_gram([holding.inputs(run, 2 * cols, cols, torch.float32, cols)])
        for name, cols in model.inputs.items()
    }
    total = 0.0
    for key, linear in enumerate(model.linears):
        base, tuned, _ = holding.weights(run, (linear.rows, linear.cols), torch.float32, key)
        gram = grams[linear.input]
        total += run.clock.once(partial(authors_fasterprune, base, tuned, gram, options))
    return total
