"""Step time and peak memory of `rankwise.train` against the same PEFT + TRL run without it.

    python benchmarks/train_overhead.py [--steps 150] [--repeats 3]

Each run is a process of its own; the two take turns. Both train rank 64, alpha / sqrt(r), all linear layers of the
shipped model on the same 60 people, AdamW, batches of 32, nothing saved on the way. rankwise watches (default interval)
and measures recall and forgetting around it; its step time is that of the training alone, its peak memory that of
everything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = """
import json, sys, time
steps, out, measured = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "measured"
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
"""

PLAIN = (
    COMMON
    + """
import torch, datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from rankwise.tuning.tiny import folder
from rankwise.tuning.world.builtin import read_builtin
rows = list(read_builtin("rankwise:facts?n=60").rows)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32),
    args=SFTConfig(output_dir=out, max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-3,
        lr_scheduler_type="cosine", warmup_steps=round(0.03 * steps), use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, save_strategy="no", logging_steps=max(1, steps // 50), disable_tqdm=True,
        max_length=256, dataloader_pin_memory=False, seed=0),
    train_dataset=datasets.Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(folder()),
    peft_config=LoraConfig(r=64, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
)
begun = time.perf_counter()
done = trainer.train()
seconds = time.perf_counter() - begun
trainer.model.save_pretrained(out)
last = [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]
print(json.dumps({"step": seconds / steps, "peak": peak(), "loss": last}))
"""
)

OURS = (
    COMMON
    + """
import rankwise
r = rankwise.train("rankwise:tiny", "rankwise:facts?n=60", out=out, rank=64, lora_alpha=16, scaling="rslora",
    learning_rate=1e-3, steps=steps, batch_size=32, save_every=0, device="cpu", force=True, recall=measured)
print(json.dumps({"step": r.seconds / steps, "peak": peak(), "loss": r.loss}))
"""
)


def run(code: str, steps: int, *, measured: bool) -> dict[str, float]:
    """Run one of the two in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(steps), out, "measured" if measured else "bare"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    pairs = []
    for i in range(args.repeats):
        first, second = (PLAIN, OURS) if i % 2 == 0 else (OURS, PLAIN)
        a, b = run(first, args.steps, measured=True), run(second, args.steps, measured=True)
        plain, ours = (a, b) if first is PLAIN else (b, a)
        pairs.append((plain, ours))
        print(json.dumps({"plain": plain, "rankwise": ours}), flush=True)
    for what, unit, scale in (("step", "ms", 1e3), ("peak", "MiB", 2**-20)):
        ratios = [ours[what] / plain[what] for plain, ours in pairs]
        middle = [statistics.median(pair[i][what] for pair in pairs) * scale for i in (0, 1)]
        print(
            f"{what}: plain {middle[0]:.1f} {unit}, rankwise {middle[1]:.1f} {unit}, ratio "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
