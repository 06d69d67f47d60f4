"""By how much `extract --calibration` lowers output errors and brings the loss nearer to the tuned model's.

The shipped model is fully fine-tuned on invented facts, and its difference is cut to a rank with and without
calibration. Embeddings stay as they were, and norms are stored whole. A few minutes on a CPU:

    python lab/calibration_gain.py OUT
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, Final

import rankwise
from rankwise.tuning.data import Examples
from rankwise.tuning.encoding import encode
from rankwise.tuning.models import load_model
from rankwise.tuning.tiny import folder
from rankwise.tuning.world.builtin import read_builtin

DATA: Final = "rankwise:facts?n=200&seed={seed}"
STEPS: Final = 150
BATCH: Final = 16
RATE: Final = 1e-3
TEXTS: Final = 400


def tune(out: Path, data: str, *, seed: int) -> None:
    """Fine-tune everything but the embeddings, and save the model."""
    import torch

    shutil.copytree(folder(), out)
    loaded = load_model(str(folder()), device="cpu")
    builtin = read_builtin(data)
    columns = encode(Examples(builtin.name, "prompt-completion", builtin.rows, ()), loaded.tokenizer, 64)
    rows = list(zip(columns["input_ids"], columns["labels"], strict=True))
    model: Any = loaded.model
    model.get_input_embeddings().weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(STEPS):
        batch = [rows[i] for i in torch.randint(0, len(rows), (BATCH,), generator=generator).tolist()]
        length = max(len(ids) for ids, _ in batch)
        padded = [
            torch.tensor([[*values, *[fill] * (length - len(values))] for values in column])
            for column, fill in (([ids for ids, _ in batch], 0), ([labels for _, labels in batch], -100))
        ]
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch])
        loss = model(input_ids=padded[0], labels=padded[1], attention_mask=mask).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(out)


def main() -> None:
    """Print a row a seed and rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    print("seed  rank  output error  without  loss off by  without  lowered")
    for seed in range(1, asked.seeds + 1):
        tuned, data = asked.out / f"tuned-{seed}", DATA.format(seed=seed)
        if not tuned.exists():
            tune(tuned, data, seed=seed)
        for rank in asked.ranks:
            c = rankwise.extract(
                folder(),
                tuned,
                asked.out / f"adapter-{seed}-{rank}",
                rank=rank,
                save_whole=True,
                calibration=data,
                calibration_samples=TEXTS,
                device="cpu",
                force=True,
            ).calibration
            if c is None or None in (c.output_error, c.output_error_plain, c.loss_difference_lowered):
                raise SystemExit("the losses are not known")
            print(
                f"{seed:4}  {rank:4}  {c.output_error:12.1%}  {c.output_error_plain:7.1%}  {c.loss_difference:11.4f}  "
                f"{c.loss_difference_plain:7.4f}  {c.loss_difference_lowered:7.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
