"""A token of a Llama of Transformers behind a long context: with its own cache, and with a horizon in every layer.

    python -m benchmarks.huggingface        # the table, and benchmarks/results/cpu-huggingface.{json,md}

One model with random weights serves all. Before it is timed, each cache must give the logits of a pass over the whole
text, and full horizons those of the model as Transformers runs it. The caches take turns of a few tokens, so that a
noisy machine disturbs all alike; reported are medians, and medians of the turns' ratios.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.parts.machine import describe
from dsmr.console.files import write_json, write_text
from dsmr.integrations.huggingface import DSMRCache, set_schedule

LAYERS, WIDTH, HEADS, VOCABULARY = 6, 512, 8, 746
CHECKED = 6  # tokens whose logits are compared
TOLERANCE, ROUNDED = 1e-4, 0.05  # of logits in float32, whose standard deviation is 0.45; of an int8 memory


@dataclass(frozen=True)
class Contender:
    """A cache by name. `schedule` None = Transformers' own; `exact`: the memory rounds nothing."""

    name: str
    schedule: str | None
    options: dict[str, Any]
    exact: bool = True


def contenders(context: int) -> list[Contender]:
    full = f"full(layers={LAYERS}, length={2 * context})"
    two_scale = f"two_scale(layers={LAYERS}, long={context // 2}, short={context // 16}, n_long=1)"
    return [
        Contender("DynamicCache", None, {}),
        Contender("DSMRCache", full, {}),
        Contender("DSMRCache", two_scale, {}),
        Contender("DSMRCache, slack=0", two_scale, {"slack": 0}),
        Contender("DSMRCache, int8", two_scale, {"dtype": torch.int8}, exact=False),
    ]


class Decoder:
    """The model with a contender's cache, behind a context (1, n)."""

    def __init__(self, model: Any, contender: Contender, context: Tensor) -> None:
        self.model, self.contender = model, contender
        self.enter()
        own = contender.schedule is None
        self.cache: Any = DynamicCache(config=model.config) if own else DSMRCache(model.config, **contender.options)
        self.step(context)

    def enter(self) -> None:
        """Make the model attend as this contender does."""
        self.model.set_attn_implementation("sdpa" if self.contender.schedule is None else "dsmr")
        if self.contender.schedule is not None:
            set_schedule(self.model, self.contender.schedule)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (vocabulary,) behind these tokens (1, n)."""
        return self.model(tokens, past_key_values=self.cache, logits_to_keep=1).logits[0, -1]

    @property
    def nbytes(self) -> int:
        if isinstance(self.cache, DSMRCache):
            return self.cache.nbytes
        return sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))


def checked(model: Any, contender: Contender, context: Tensor, tokens: Tensor, host: Tensor | None) -> Decoder:
    """The decoder behind context and tokens, whose logits (n, vocabulary) were right on the way.

    Raises:
        AssertionError: if they were not.
    """
    decoder = Decoder(model, contender, context)
    found = torch.stack([decoder.step(token[None, None]) for token in tokens])
    whole = model(torch.cat([context, tokens[None]], 1), use_cache=False, logits_to_keep=len(tokens)).logits[0]
    allowed = TOLERANCE if contender.exact else ROUNDED
    for expected in (whole, host):
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=allowed, msg=lambda said: f"{contender}: {said}")
    return decoder


@torch.no_grad()
def compare(context: int, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Milliseconds a token and bytes of the cache of every contender, the first being Transformers' own."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=4 * context,
        )
    ).eval()
    text = torch.randint(VOCABULARY, (1, context + CHECKED))
    read, shown = text[:, :context], text[0, context:]
    host = model(text, use_cache=False, logits_to_keep=CHECKED).logits[0]
    rows: list[dict[str, Any]] = []
    decoders = []
    for contender in contenders(context):
        same = contender.schedule is None or contender.schedule.startswith("full")
        decoders.append(checked(model, contender, read, shown, host if same else None))
        rows.append({"name": contender.name, "schedule": contender.schedule, "turns": []})
    for turn in track(range(rounds + 1), "decoding", transient=True):
        for row, decoder in zip(rows, decoders, strict=True):
            decoder.enter()
            decoder.step(shown[None, :1])
            begin = time.perf_counter()
            for token in range(tokens):
                decoder.step(shown[None, token % CHECKED, None])
            if turn:
                row["turns"].append((time.perf_counter() - begin) / tokens)
    for row, decoder in zip(rows, decoders, strict=True):
        row["ms"] = 1e3 * statistics.median(row["turns"])
        row["faster"] = statistics.median(a / b for a, b in zip(rows[0]["turns"], row["turns"], strict=True))
        row["bytes"] = decoder.nbytes
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| cache | schedule | ms a token | times as fast as DynamicCache | cache, MiB | of DynamicCache |",
        "|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['name']} | {row['schedule'] or ''} | {row['ms']:.1f} | {row['faster']:.2f} × "
        f"| {row['bytes'] / 2**20:.1f} | {row['bytes'] / rows[0]['bytes']:.2f} × |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--context", type=int, default=4000, help="tokens before the first that is timed")
    parser.add_argument("--rounds", type=int, default=9, help="turns of every cache")
    parser.add_argument("--tokens", type=int, default=4, help="tokens of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = describe(torch.device("cpu")) | {"transformers": transformers.__version__}
    rows = compare(arguments.context, arguments.rounds, arguments.tokens)
    command = f"python -m benchmarks.huggingface --context {arguments.context} --rounds {arguments.rounds}"
    text = (
        f"A Llama of {LAYERS} layers, width {WIDTH}, {HEADS} heads, float32, behind {arguments.context:,} tokens. "
        f"Measured by `{command}` on: {', '.join(f'{key} {value}' for key, value in machine.items())}.\n\n"
    )
    Console().print(text + table(rows), soft_wrap=True, highlight=False)
    write_json(arguments.out / "cpu-huggingface.json", {"machine": machine, "rows": rows})
    write_text(arguments.out / "cpu-huggingface.md", text + table(rows) + "\n")


if __name__ == "__main__":
    main()
