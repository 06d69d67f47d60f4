"""`rankwise.check` against the loop one would write with PEFT: `python benchmarks/check_speed.py [--repeats 3]`.

The loop loads the model and wraps it anew for every rule, rank and seed, takes as many AdamW steps on the same batches,
and measures the same figures with hooks at the same steps. Both run in this process, in turns; the model's files are in
the cache of the system. Three pairs: all steps against all steps, the first step alone against the loop's first step,
and the first step alone against all of the loop. `--toy` is for seeing that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import rankwise
from rankwise.tuning.data import Examples
from rankwise.tuning.encoding import encode
from rankwise.tuning.models import load_model
from rankwise.tuning.stability.subject import LanguageModel, language_model
from rankwise.tuning.targets import target_modules
from rankwise.tuning.tiny import folder
from rankwise.tuning.world.builtin import read_builtin
from side_by_side import HEAD, compare

DATA, RATE, ALPHA = "rankwise:facts?n=40&seed=1", 1e-3, 16.0
RULES = ("lora", "rslora")


def batches(steps: int, size: int) -> LanguageModel:
    """Return the batches that `check` makes of the data."""
    built = read_builtin(DATA)
    loaded = load_model("rankwise:tiny", device="cpu")
    rows = tuple(built.rows[i] for i in random.Random(0).sample(range(len(built.rows)), size * (steps + 1)))
    columns = encode(Examples(built.name, "prompt-completion", rows, ()), loaded.tokenizer, 256)
    return language_model(loaded.model, target_modules(loaded.model), columns, steps=steps, size=size)


class Ears:
    """Outputs of both branches of every LoRA layer, and sums of their squares."""

    def __init__(self, model: Any) -> None:
        self.sums: dict[str, float] = {}
        self.handles = []
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_B"):
                for part, inner in (("branch", layer.lora_B["default"]), ("frozen", layer.base_layer)):
                    self.handles.append(inner.register_forward_hook(self.hook(f"{name}.{part}")))

    def hook(self, key: str) -> Callable[..., None]:
        def hear(_: Any, __: Any, output: torch.Tensor) -> None:
            self.sums[key] = float(output.detach().square().mean())

        return hear

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def loop(made: LanguageModel, ranks: tuple[int, ...], seeds: int, measured: tuple[int, ...]) -> list[dict[str, float]]:
    """Take every run by itself."""
    rows = []
    for rule in RULES:
        for rank in ranks:
            for seed in range(seeds):
                torch.manual_seed(seed)
                base = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
                config = LoraConfig(
                    r=rank,
                    lora_alpha=ALPHA,
                    use_rslora=rule == "rslora",
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                )
                model = get_peft_model(base, config).train()
                trained = [p for p in model.parameters() if p.requires_grad]
                optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
                for step in range(1, measured[-1] + 1):
                    batch = made.batches[(step - 1) % len(made.batches)]
                    labels = torch.full_like(batch.ids, -100)
                    labels[:, 1:][batch.predicts[:, :-1]] = batch.targets
                    optimizer.zero_grad()
                    loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
                    loss.backward()
                    row = {"loss": float(loss.detach())}
                    if step in measured:
                        row |= {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
                    optimizer.step()
                    if step in measured:
                        ears = Ears(model)
                        with torch.no_grad():
                            model(input_ids=made.measuring.ids, attention_mask=made.measuring.mask)
                        ears.close()
                        rows.append(row | ears.sums)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if args.toy:
        args.ranks, args.seeds, args.steps, args.repeats = [4, 16], 1, [1, 2], 1
    logging.disable_progress_bar()
    ranks, steps = tuple(args.ranks), tuple(args.steps)
    made = batches(steps[-1], args.batch_size)

    def ours(taken: tuple[int, ...]) -> Callable[[], object]:
        return lambda: rankwise.check(
            "rankwise:tiny",
            DATA,
            ranks=ranks,
            scaling=RULES,
            steps=taken,
            seeds=args.seeds,
            batch_size=args.batch_size,
            learning_rate=RATE,
            device="cpu",
        )

    def theirs(taken: tuple[int, ...]) -> Callable[[], object]:
        return lambda: loop(made, ranks, args.seeds, taken)

    what = f"{len(RULES)} rules x {len(ranks)} ranks x {args.seeds} seeds"
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps(machine | {"threads": torch.get_num_threads(), "batch": args.batch_size}))
    print(HEAD)
    for name, mine, peer in (
        (f"{what}, {steps[-1]} steps", steps, steps),
        (f"{what}, first step", (1,), (1,)),
        (f"{what}, first step against {steps[-1]}", (1,), steps),
    ):
        print(compare(name, ours(mine), "a fresh PEFT model each", theirs(peer), args.repeats).row(), flush=True)


if __name__ == "__main__":
    main()
