"""How far the first step moves a LoRA branch, against the rank: the toy behind the README's exponents.

    python lab/first_step.py

Linear regression in float64, width 512, PEFT's init (A uniform, B = 0), alpha = 16 under every rule. One step of SGD or
of Adam's first step (the sign of the gradient); the figure is the slope of log2 RMS(scaling * B A x) on log2 r.
"correlated": inputs share a mean direction, as the activations of language models do; "independent": fresh Gaussian
inputs at every evaluation. numpy alone, 10 seeds, about ten seconds on one core.
"""

from __future__ import annotations

import numpy as np

from rankwise.scaling import SCALINGS, scaling

WIDTH, BATCH, SEEDS = 512, 64, 10
RANKS = (4, 8, 16, 32, 64, 128, 256)


def branch_rms(rule: str, optimizer: str, correlated: bool, r: int, seed: int) -> float:
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(WIDTH) * (3.0 if correlated else 0.0)
    train, held_out = (mean + rng.standard_normal((BATCH, WIDTH)) for _ in range(2))  # (batch, in)
    target = train @ rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)  # (batch, out)
    bound = 1 / np.sqrt(WIDTH)  # kaiming_uniform with a = sqrt(5)
    a = rng.uniform(-bound, bound, (r, WIDTH))
    s = scaling(rule, 16.0, r)
    gradient = -s * target.T @ (train @ a.T) / BATCH  # (out, r); B = 0, so A has none yet
    b = -(np.sign(gradient) if optimizer == "adam" else gradient)
    return float(np.sqrt(np.mean((s * held_out @ a.T @ b.T) ** 2)))


def main() -> None:
    print("| optimizer | inputs | " + " | ".join(SCALINGS) + " |\n" + "| --- " * (2 + len(SCALINGS)) + "|")
    for optimizer in ("sgd", "adam"):
        for correlated in (True, False):
            cells = []
            for rule in SCALINGS:
                slopes = [
                    np.polyfit(
                        np.log2(RANKS), np.log2([branch_rms(rule, optimizer, correlated, r, k) for r in RANKS]), 1
                    )[0]
                    for k in range(SEEDS)
                ]
                cells.append(f"{np.mean(slopes):+.2f} (sd {np.std(slopes, ddof=1):.2f})")
            print(f"| {optimizer} | {'correlated' if correlated else 'independent'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
